"""NVIDIA (and, through the same name in torch, AMD) cards."""

from __future__ import annotations

import os

from danqing.devices.accelerator import Accelerator
from danqing.devices.base import Availability, Computes

_FIRST_WITH_BFLOAT16 = (
    8,
    0,
)  # Ampere; before it torch emulates bfloat16 at a fraction of the speed


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

    def computes(self, dtype: str) -> Computes:
        """Count bfloat16 as native from compute capability 8.0 on."""
        import torch

        if dtype == "bfloat16" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(self.index)
            return "native" if capability >= _FIRST_WITH_BFLOAT16 else "no"
        return super().computes(dtype)
