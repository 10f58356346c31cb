"""The three stages of a model, each loaded, timed, checked and dropped as the plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing.engine.finish import check_image, to_image
from danqing.engine.probe import tensors_of
from danqing.engine.watch import StepWatch
from danqing.errors import BrokenPictureError
from danqing.generation import StageCost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from PIL.Image import Image

    from danqing.engine.active import ActiveRequest
    from danqing.engine.clock import StageClock
    from danqing.engine.conditions import Conditions, Encoded
    from danqing.engine.residence import Residence
    from danqing.models.model import Model
    from danqing.plan import Plan
    from danqing.request import Resolved
    from danqing.runner import Listener


class Stages:
    """Encode, denoise and decode, on components that are loaded when a stage needs them."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        clock: StageClock,
        residence: Residence,
        conditions: Conditions,
    ) -> None:
        """Keep the parts."""
        self._conditions = conditions
        self._model = model
        self._plan = plan
        self._clock = clock
        self._residence = residence

    def encode(self, request: Resolved, costs: list[StageCost], listen: Listener | None) -> Encoded:
        """Return the conditioning of a prompt, with notes; that of the last few prompts is kept."""
        count = request.num_images_per_prompt
        known = self._conditions.find(request)
        if known is not None:
            costs.append(
                StageCost(name="encode", seconds=0.0, peak_bytes=None, pictures=count, reused=True)
            )
            return known
        modules = self._residence.load(self._model.needs("encode", request), costs, listen)
        with self._clock.stage("encode", costs, pictures=count):
            conditioning, notes = self._model.encode(modules, request)
            for name, tensor in tensors_of(conditioning):
                if not bool(tensor.isfinite().all()):
                    raise self._not_finite("encode", name)
        self._residence.drop_stage("encode")
        self._conditions.keep(request, (conditioning, notes))
        return conditioning, notes

    def render(
        self,
        work: ActiveRequest,
        drawn: Sequence[Sequence[torch.Tensor]],
        indexes: Sequence[int],
        costs: list[StageCost],
    ) -> list[Image]:
        """Denoise, decode and check some images that are computed together."""
        latents = self._denoise(work, drawn, indexes, costs)
        pixels = self._decode(work, latents, costs)
        images = [to_image(picture) for picture in pixels]
        for image in images:
            check_image(image)
        return images

    def _denoise(
        self,
        work: ActiveRequest,
        drawn: Sequence[Sequence[torch.Tensor]],
        indexes: Sequence[int],
        costs: list[StageCost],
    ) -> torch.Tensor:
        request = work.request
        steps = request.num_inference_steps
        modules = self._residence.load(self._model.needs("denoise", request), costs, work.listen)
        with self._clock.stage("denoise", costs, pictures=len(drawn), steps=steps):
            watch = StepWatch(self._clock.device, indexes, work, self._preview)
            latents = self._model.denoise(modules, work.conditioning, drawn, request, watch)
            if (bad := watch.first_bad_step()) is not None:
                raise self._not_finite("denoise", f"the latents after step {bad} of {steps}")
        self._residence.drop_stage("denoise")
        return latents

    def _decode(
        self, work: ActiveRequest, latents: torch.Tensor, costs: list[StageCost]
    ) -> torch.Tensor:
        request = work.request
        modules = self._residence.load(self._model.needs("decode", request), costs, work.listen)
        with self._clock.stage("decode", costs, pictures=len(latents)):
            pixels = self._decode_by_plan(modules, latents, request)
            pixels = work.look.first("decode/pixels", pixels)
            if not bool(pixels.isfinite().all()):
                raise self._not_finite("decode", "the pixels")
        self._residence.drop_stage("decode")
        return pixels

    def _preview(
        self, step: int, latents: torch.Tensor, velocity: torch.Tensor, request: Resolved
    ) -> Image | None:
        """Return what the first of some images will look like, if the decoder is in memory."""
        modules = self._residence.modules
        if not all(name in modules for name in self._model.needs("decode", request)):
            return None
        ends = self._model.glimpse(latents[:1], velocity[:1], step, request)
        return to_image(self._decode_by_plan(modules, ends, request)[0])

    def _decode_by_plan(
        self, modules: Mapping[str, Any], latents: torch.Tensor, request: Resolved
    ) -> torch.Tensor:
        """Decode as the plan says: whole, or in tiles."""
        from danqing.networks.tiling import decode_in_tiles

        def decode(part: torch.Tensor) -> torch.Tensor:
            return self._model.decode(modules, part, request)

        tile = self._plan.tile * latents.shape[-2] // request.height
        return decode_in_tiles(decode, latents, tile) if tile else decode(latents)

    def _not_finite(self, stage: str, where: str) -> BrokenPictureError:
        """Say where the numbers went wrong, and whether the weights were wrong to begin with."""
        modules = self._residence.modules
        bad = [
            f"{name}: {tensor}"
            for name in self._model.stages[stage]
            if name in modules
            for tensor, value in modules[name].named_parameters()
            if not bool(value.isfinite().all())
        ]
        hint = "the weights are finite: try --dtype float32"
        if bad:
            hint = f"the weights themselves are not finite: {bad[0]}" + (
                f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            )
        return BrokenPictureError(
            f"the numbers stopped being finite in the stage {stage}",
            seen=f"{where}, computing in {self._plan.dtype}",
            hint=hint,
        )
