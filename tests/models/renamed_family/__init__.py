"""A family whose components bear other names: a denoiser `unet`, two CLIPs, T5 as the third."""

from danqing.models.base import ModelSpec
from danqing.models.slots import Slot
from danqing.weights import Checkpoint

PIPELINE = "RenamedPipeline"
SLOTS = (
    Slot(name="text_encoder", kind="clip", role="text encoder", tokenizer="tokenizer"),
    Slot(name="text_encoder_2", kind="clip", role="text encoder", tokenizer="tokenizer_2"),
    Slot(name="text_encoder_3", kind="t5", role="text encoder", tokenizer="tokenizer_3"),
    Slot(name="unet", kind="flux_transformer", role="denoiser"),
    Slot(name="vae", kind="kl", role="decoder"),
    Slot(name="tokenizer", kind="clip_tokenizer", role="tokenizer"),
    Slot(name="tokenizer_2", kind="clip_tokenizer", role="tokenizer"),
    Slot(name="tokenizer_3", kind="t5_tokenizer", role="tokenizer"),
    Slot(name="scheduler", kind="flow_match_euler", role="schedule", required=False),
)


def spec() -> ModelSpec:
    return ModelSpec(
        family="renamed", kind="toy", title="Renamed", defaults={}, no_effect={}, size_multiple=16,
        limits={},
    )  # fmt: skip


def identify(checkpoint: Checkpoint) -> ModelSpec:
    checkpoint.component("unet")
    return spec()
