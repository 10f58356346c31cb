"""Apple silicon."""

from __future__ import annotations

import platform

from danqing.devices.base import Availability, Computes, Device, Memory


class Mps(Device):
    """`mps`: one GPU that shares the host's memory."""

    family = "mps"

    @classmethod
    def availability(cls) -> Availability:
        """Look at the build of torch, then the system."""
        import torch

        if not torch.backends.mps.is_built():
            return Availability(
                count=0,
                reason=f"this torch ({torch.__version__}) is built without MPS",
                hint="MPS is there only on macOS with Apple silicon",
            )
        if not torch.backends.mps.is_available():
            return Availability(count=0, reason="macOS is too old for MPS, or there is no GPU")
        return Availability(count=1, reason="1 visible")

    @property
    def chip(self) -> str:
        """Processor name."""
        return platform.processor() or platform.machine()

    def memory(self) -> Memory | None:
        """Return what Metal recommends as the working set."""
        import torch

        total_bytes = torch.mps.recommended_max_memory()
        used_bytes = torch.mps.driver_allocated_memory()
        return Memory(total_bytes=total_bytes, free_bytes=max(0, total_bytes - used_bytes))

    def computes(self, dtype: str) -> Computes:
        """All three; bfloat16 from macOS 14 on."""
        old = int((platform.mac_ver()[0] or "0").split(".")[0]) < 14  # noqa: PLR2004
        return "no" if dtype == "bfloat16" and old else "native"

    def synchronize(self) -> None:
        """Wait for Metal's queue."""
        import torch

        torch.mps.synchronize()

    def reset_peak(self) -> None:
        """Metal keeps no high-water mark."""

    def peak_bytes(self) -> int | None:
        """Metal keeps no high-water mark."""
        return None

    def release(self) -> None:
        """Empty Metal's cache."""
        import torch

        torch.mps.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Recognise Metal's message."""
        return "MPS backend out of memory" in str(error)
