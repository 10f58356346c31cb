"""Watching the denoising steps: progress, previews, and the first step that was not finite."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from danqing.generation import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from PIL.Image import Image

    from danqing.devices import Device
    from danqing.engine.active import ActiveRequest
    from danqing.runner import Listener


class StepWatch:
    """Reports each denoising step, and remembers on the device whether its latents were finite."""

    def __init__(
        self,
        device: Device,
        indexes: Sequence[int],
        work: ActiveRequest,
        preview: Callable[..., Image | None],
    ) -> None:
        """Start the clock; `preview` makes an image of a step's latents."""
        self._device = device
        self._item = _item(indexes)
        self._request = work.request
        self._listen = work.listen
        self._look = work.look
        self._preview = preview
        total = self._total = work.request.num_inference_steps
        self._shown = {
            round(total * (number + 1) / (work.previews + 1)) for number in range(work.previews)
        } - {0, total}
        self._finite: list[torch.Tensor] = []
        self._start = time.perf_counter()

    def __call__(self, step: int, latents: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """Take note of a step; return the latents to go on with."""
        self._look.first(f"denoise/{step:04}/velocity", velocity)
        latents = self._look.first(f"denoise/{step:04}/latents", latents)
        self._finite.append(latents.isfinite().all())
        if self._listen is not None:
            preview = None
            if step in self._shown:
                preview = self._preview(step, latents, velocity, self._request)
            self._report(step, self._listen, preview)
        return latents

    def _report(self, step: int, listen: Listener, preview: Image | None) -> None:
        self._device.synchronize()  # or the time shown would be that of asking, not of computing
        listen(
            Progress(
                stage="denoise",
                item=self._item,
                done=step,
                total=self._total,
                unit="steps",
                seconds=time.perf_counter() - self._start,
                preview=preview,
            )
        )

    def first_bad_step(self) -> int | None:
        """Return the first step after which something was not finite, counted from 1."""
        import torch

        finite = torch.stack(self._finite).tolist() if self._finite else []
        return finite.index(False) + 1 if False in finite else None


def _item(indexes: Sequence[int]) -> str:
    if len(indexes) == 1:
        return f"picture {indexes[0]}"
    return f"pictures {indexes[0]} to {indexes[-1]}"
