"""NVIDIA (and, through the same name in torch, AMD) cards."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from danqing.devices.accelerator import Accelerator
from danqing.devices.base import Availability, Computes

if TYPE_CHECKING:
    from collections.abc import Iterator

_FIRST_WITH_BFLOAT16 = (
    8,
    0,
)  # Ampere; before it torch emulates bfloat16 at a fraction of the speed


_PEAKS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10": 125.0,
    "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip
"""TFLOP/s in bfloat16 with float32 sums, by a part of the driver's name; NVIDIA's data sheets."""


class Cuda(Accelerator):
    """`cuda:i`."""

    family = "cuda"

    @classmethod
    def availability(cls) -> Availability:
        """Look at the build of torch, then the driver, then the cards."""
        import torch

        if torch.version.cuda is None and torch.version.hip is None:
            return Availability(
                count=0,
                reason=f"this torch ({torch.__version__}) is built without CUDA",
                hint="install the CUDA build of the same torch version",
            )
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count:
            return Availability(count=count, reason=f"{count} visible")
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            reason = "no card is visible"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return Availability(
            count=0,
            reason=reason if visible is None else f"{reason} (CUDA_VISIBLE_DEVICES={visible!r})",
            hint="check 'nvidia-smi'",
        )

    @property
    def driver(self) -> str:
        """CUDA or HIP version torch was built for."""
        import torch

        return f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"

    @contextlib.contextmanager
    def deterministic(self, asked: bool) -> Iterator[None]:  # noqa: FBT001
        """Keep cuBLAS and cuDNN from choosing otherwise from run to run."""
        import torch

        if asked:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with its first call
        before = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = asked or before
        try:
            with super().deterministic(asked):
                yield
        finally:
            torch.backends.cudnn.deterministic = before

    def peak_flops(self, dtype: str) -> float | None:
        """Look the chip up in the makers' data sheets: dense, without sparsity, full power."""
        if dtype not in ("bfloat16", "float16"):
            return None
        return next((tera * 1e12 for name, tera in _PEAKS.items() if name in self.chip), None)

    def computes(self, dtype: str) -> Computes:
        """Count bfloat16 as native from compute capability 8.0 on."""
        import torch

        if dtype == "bfloat16" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(self.index)
            return "native" if capability >= _FIRST_WITH_BFLOAT16 else "no"
        return super().computes(dtype)
