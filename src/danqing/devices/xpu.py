"""Intel graphics cards."""

from __future__ import annotations

from danqing.devices.accelerator import Accelerator
from danqing.devices.base import Availability


class Xpu(Accelerator):
    """`xpu:i`."""

    family = "xpu"

    @classmethod
    def availability(cls) -> Availability:
        """Look at the build of torch, then the cards."""
        import torch

        if not getattr(torch.version, "xpu", None):
            return Availability(
                count=0,
                reason=f"this torch ({torch.__version__}) is built without XPU",
                hint="install the XPU build of the same torch version",
            )
        count = torch.xpu.device_count() if torch.xpu.is_available() else 0
        if not count:
            return Availability(count=0, reason="no Intel card is visible")
        return Availability(count=count, reason=f"{count} visible")
