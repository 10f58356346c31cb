"""FLUX.1: schnell and the guidance-distilled kinds (dev, Krea), from Black Forest Labs.

Which kind it is, is read from the transformer's tensors: a dev-type has a guidance embedder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from danqing.errors import UnknownModelError
from danqing.models.base import ModelSpec, stated
from danqing.models.slots import Slot
from danqing.request import MAX_SIDE

if TYPE_CHECKING:
    from danqing.weights import Checkpoint, Component

FAMILY = "flux1"
MAX_TOKENS = 512
"""What T5 was trained with here; diffusers refuses more too."""

SLOTS = (
    Slot("text_encoder", "clip", "text encoder", "encode", tokenizer="tokenizer"),
    Slot("text_encoder_2", "t5", "text encoder", "encode", tokenizer="tokenizer_2"),
    Slot("transformer", "flux_transformer", "denoiser", "denoise"),
    Slot("vae", "kl", "decoder", "decode"),
    Slot("tokenizer", "clip_tokenizer", "tokenizer"),
    Slot("tokenizer_2", "t5_tokenizer", "tokenizer"),
    Slot("scheduler", "flow_match_euler", "schedule", required=False),
)
MODEL = "danqing.models.flux.model:FluxModel"
PIPELINE = "FluxPipeline"
"""Class of its pipeline in a model_index.json."""

_INPUT = {"bfl": "img_in.weight", "diffusers": "x_embedder.weight"}
_GUIDANCE = {
    "bfl": "guidance_in.in_layer.weight",
    "diffusers": "time_text_embed.guidance_embedder.linear_1.weight",
}
_MAX_LEVELS = 8
_OUTPUT = {"bfl": "final_layer.linear.weight", "diffusers": "proj_out.weight"}


def identify(checkpoint: Checkpoint) -> ModelSpec:
    """Return which FLUX.1 a checkpoint is, from the names and shapes of its tensors.

    Raises:
        UnknownModelError: it is a FLUX.1 that needs a control picture or a mask.
    """
    transformer = checkpoint.component("transformer")
    _refuse_conditioned(checkpoint, transformer)
    guided = _GUIDANCE[transformer.style] in transformer.entries
    found = spec(guided=guided, multiple=_size_multiple(checkpoint))
    return replace(found, **_own_measures(checkpoint, found))


def spec(*, guided: bool = False, multiple: int = 16) -> ModelSpec:
    """Return what schnell or, with a guidance embedder, a dev type takes.

    Steps and tokens are those of the BFL release; the guidance of 3.5 is the model card's.
    """
    no_effect = dict.fromkeys(
        ("image", "resize", "reference_latent"), "FLUX.1 schnell and dev paint from words alone"
    )
    no_effect |= {
        "negative_prompt": "FLUX.1 has no classifier-free guidance, so nothing is steered away from"
    }
    defaults: dict[str, Any] = {
        "height": 1024,
        "width": 1024,
        "num_inference_steps": 4,
        "max_sequence_length": 256,
    }
    if guided:
        defaults |= {"num_inference_steps": 50, "max_sequence_length": 512, "guidance_scale": 3.5}
    else:
        no_effect["guidance_scale"] = (
            "it is distilled to few steps without guidance (its weights have no guidance embedder)"
        )
    return ModelSpec(
        family=FAMILY,
        kind="dev" if guided else "schnell",
        title="FLUX.1 (dev type)" if guided else "FLUX.1-schnell",
        defaults=defaults,
        no_effect=no_effect,
        size_multiple=multiple,
        limits={"max_sequence_length": MAX_TOKENS},
    )


def _own_measures(checkpoint: Checkpoint, found: ModelSpec) -> dict[str, Any]:
    """Return defaults and limits as far as the files tell: side of the pictures, tokens read.

    The released weights say 1024 pixels and 512 tokens.
    """
    defaults, limits = dict(found.defaults), dict(found.limits)
    components = checkpoint.components
    if side := stated(components.get("vae"), "sample_size", MAX_SIDE):
        defaults |= {"height": side, "width": side}
    tokens = stated(components.get("tokenizer_2"), "model_max_length", MAX_TOKENS)
    if tokens:
        defaults["max_sequence_length"] = min(tokens, defaults["max_sequence_length"])
        limits["max_sequence_length"] = tokens
    return {"defaults": defaults, "limits": limits}


def _size_multiple(checkpoint: Checkpoint) -> int:
    """Return twice the VAE's downscaling: latents are packed in patches of 2 x 2. FLUX.1: 16."""
    vae = checkpoint.components.get("vae")
    if vae is None:
        return 16
    prefix = "encoder.down." if vae.style == "bfl" else "encoder.down_blocks."
    levels = len({name.split(".")[2] for name in vae.entries if name.startswith(prefix)})
    return int(2 ** min(max(levels, 1), _MAX_LEVELS))


def _refuse_conditioned(checkpoint: Checkpoint, transformer: Component) -> None:
    """Refuse the kinds whose input has more channels than their output."""
    entry = transformer.entries[_INPUT[transformer.style]]
    inputs = entry.shape[-1] if entry.shape else 0
    output = transformer.entries.get(_OUTPUT[transformer.style])
    outputs = output.shape[0] if output is not None and output.shape else inputs
    kinds = {
        2: "FLUX.1 Canny or Depth, which needs a control picture",
        6: "FLUX.1 Fill, which needs a picture and a mask",
    }
    if outputs and inputs != outputs and (kind := kinds.get(inputs // outputs)):
        raise UnknownModelError(
            f"this is {kind}; danqing does not run it yet",
            seen=f"{checkpoint.path}: {inputs} input channels",
            allowed=f"{outputs} input channels: FLUX.1 schnell, dev, Krea",
        )
