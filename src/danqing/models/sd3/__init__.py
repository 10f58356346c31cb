"""Stable Diffusion 3 and 3.5, from Stability AI: two CLIPs and T5 tell a transformer what to make.

Which one it is, is read from the transformer's tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from danqing.models.base import ModelSpec, stated
from danqing.models.slots import Slot

if TYPE_CHECKING:
    from danqing.weights import Checkpoint

FAMILY = "sd3"
PIPELINE = "StableDiffusion3Pipeline"
MODEL = "danqing.models.sd3.model:SD3Model"
SLOTS = (
    Slot("text_encoder", "clip", "text encoder", "encode", tokenizer="tokenizer"),
    Slot("text_encoder_2", "clip", "text encoder", "encode", tokenizer="tokenizer_2"),
    Slot("text_encoder_3", "t5", "text encoder", "encode", tokenizer="tokenizer_3"),
    Slot("transformer", "sd3_transformer", "denoiser", "denoise"),
    Slot("vae", "kl", "decoder", "decode"),
    Slot("tokenizer", "clip_tokenizer", "tokenizer"),
    Slot("tokenizer_2", "clip_tokenizer", "tokenizer"),
    Slot("tokenizer_3", "t5_tokenizer", "tokenizer"),
    Slot("scheduler", "flow_match_euler", "schedule", required=False),
)
_KINDS = {
    "3.5-medium": ("transformer_blocks.0.attn2.to_q.weight", 40, 4.5),
    "3.5-large": ("transformer_blocks.0.attn.norm_q.weight", 28, 3.5),
    "3-medium": ("transformer_blocks.0.attn.to_q.weight", 28, 7.0),
}
"""Of each: a tensor that those below lack; steps and guidance of the model card."""


def identify(checkpoint: Checkpoint) -> ModelSpec:
    """Return which of them a checkpoint is; sides and limits are those its config states."""
    part = checkpoint.component("transformer")
    kind = next((name for name, row in _KINDS.items() if row[0] in part.entries), "3-medium")
    side, places = stated(part, "sample_size", 128), stated(part, "pos_embed_max_size", 1024)
    return spec(kind, side=8 * (side or 128), places=places or 192)


def spec(kind: str = "3.5-medium", *, side: int = 1024, places: int = 384) -> ModelSpec:
    """Return what it takes.

    Args:
        kind: one of the three.
        side: of an image, in pixels, where the request names none.
        places: rows of patches that the transformer knows.
    """
    _, steps, guidance = _KINDS[kind]
    return ModelSpec(
        family=FAMILY,
        kind=kind,
        title=f"Stable Diffusion {kind}",
        own_name=f"sd{kind}",
        defaults={
            "height": side, "width": side, "num_inference_steps": steps,
            "guidance_scale": guidance, "negative_prompt": "", "max_sequence_length": 256,
        },
        no_effect=dict.fromkeys(("image", "resize", "reference_latent"), "it reads text alone"),
        size_multiple=16,
        limits={"height": 16 * places, "width": 16 * places, "max_sequence_length": 512},
    )  # fmt: skip
