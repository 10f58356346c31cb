"""A family with FLUX.1's networks whose denoiser is called `unet`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from danqing.models import flow, flux
from danqing.models.flux.model import FluxModel
from danqing.models.slots import Slot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from danqing.models.base import ModelSpec
    from danqing.models.model import Batch, Conditioning, Modules
    from danqing.weights import Checkpoint

PIPELINE = "UnetPipeline"
MODEL = "tests.models.unet_family:UnetModel"
OTHERS = tuple(slot for slot in flux.SLOTS if slot.role != "denoiser")
SLOTS = (Slot("unet", "flux_transformer", "denoiser", "denoise"), *OTHERS)


def spec() -> ModelSpec:
    return replace(flux.spec(), family="unet")


def identify(checkpoint: Checkpoint) -> ModelSpec | None:
    return spec() if "unet" in checkpoint.components else None


class UnetModel(FluxModel):
    slots: ClassVar[tuple[Slot, ...]] = SLOTS

    def fits(self) -> Iterable[tuple[str, str, int, int]]:
        return ()

    def assumptions(self) -> tuple[str, ...]:
        return ()

    def predictor(
        self, modules: Modules, conditioning: Conditioning, batch: Batch
    ) -> flow.Predictor:
        return super().predictor({**modules, "transformer": modules["unet"]}, conditioning, batch)
