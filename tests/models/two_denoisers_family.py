"""A family with two denoisers: `unet` for the first steps, `unet_2` for the others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from danqing.models import flow, flux
from danqing.models.flux.model import FluxModel
from danqing.models.slots import Slot
from tests.models import unet_family

if TYPE_CHECKING:
    import torch

    from danqing.models.base import ModelSpec
    from danqing.models.model import Batch, Conditioning, Modules
    from danqing.weights import Checkpoint

PIPELINE = "TwoDenoisersPipeline"
MODEL = "tests.models.two_denoisers_family:TwoDenoisersModel"
SLOTS = (
    Slot("unet", "flux_transformer", "denoiser", "denoise"),
    Slot("unet_2", "flux_transformer", "denoiser", "denoise"),
    *unet_family.OTHERS,
)


def spec() -> ModelSpec:
    return replace(flux.spec(), family="two denoisers")


def identify(checkpoint: Checkpoint) -> ModelSpec | None:
    return spec() if "unet_2" in checkpoint.components else None


class TwoDenoisersModel(unet_family.UnetModel):
    slots: ClassVar[tuple[Slot, ...]] = SLOTS

    def predictor(
        self, modules: Modules, conditioning: Conditioning, batch: Batch
    ) -> flow.Predictor:
        first, second = (
            FluxModel.predictor(
                self, {**modules, "transformer": modules[name]}, conditioning, batch
            )
            for name in self.role("denoiser")
        )
        change = batch.request.num_inference_steps // 2

        def velocity(latents: torch.Tensor, step: int) -> torch.Tensor:
            return (first if step < change else second).velocity(latents, step)

        return flow.Predictor(velocity, first.embed)
