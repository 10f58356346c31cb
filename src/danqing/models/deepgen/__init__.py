"""DeepGen-1.0: pictures and edits from Qwen2.5-VL-3B, a connector and the transformer of SD3.5.

It is told by its connector: a transformer of SD3's kind beside queries that a language model reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from danqing.errors import NoEffectError, RequestError
from danqing.models.base import ModelSpec, stated
from danqing.models.slots import Slot

if TYPE_CHECKING:
    from danqing.references import Reference
    from danqing.request import Request, Resolved
    from danqing.weights import Checkpoint

FAMILY = "deepgen"
SLOTS = (
    Slot("vlm", "qwen_vl", "text encoder", "encode", tokenizer="tokenizer"),
    Slot("connector", "deepgen_connector", "connector", "encode"),
    Slot("transformer", "sd3_transformer", "denoiser", "denoise"),
    Slot("vae", "kl", "decoder", "decode"),
    Slot("vae", "kl", "image encoder", "encode", setting="image"),
    Slot("tokenizer", "qwen2_tokenizer", "tokenizer"),
    Slot("scheduler", "flow_match_euler", "schedule", required=False),
)
MODEL = "danqing.models.deepgen.model:DeepGenModel"
PIPELINE = "DeepGenPipeline"
"""Class of its pipeline in a model_index.json."""
MULTIPLE = 32
"""Of every side, in pixels: the vision tower sees 28 pixels where the autoencoder sees 32."""
SIDE = 512
"""Pixels; pictures as large as a square of this side are what it was trained with."""
NEGATIVE_EDIT = (
    "blurry, low quality, low resolution, distorted, deformed, broken content, missing parts, "
    "damaged details, artifacts, glitch, noise, pixelated, grainy, compression artifacts, "
    "bad composition, wrong proportion, incomplete editing, unfinished, unedited areas."
)
"""What the published results of editing steer away from: their evaluation scripts' words."""

_MAX_ROWS = 1024
_FOR_EDITS = ("resize", "reference_latent")


def identify(checkpoint: Checkpoint) -> ModelSpec | None:
    """Return which DeepGen a checkpoint is; None if it only has a transformer of the same kind.

    Raises:
        danqing.errors.CheckpointIncompleteError: it says that it is one, and lacks what makes it.
    """
    if PIPELINE in str(checkpoint.index.get("_class_name")):
        checkpoint.component("connector")  # raises: it is missing
    if "connector" not in checkpoint.components:
        return None
    transformer = checkpoint.component("transformer")
    return spec(stated(transformer, "pos_embed_max_size", _MAX_ROWS))


def spec(rows: int | None = None) -> DeepGenSpec:
    """Return what it takes.

    Args:
        rows: of patches that the transformer knows the places of; the released weights say 384.
    """
    largest = (rows or 384) * 16 // MULTIPLE * MULTIPLE
    side = min(SIDE, largest // 2 // MULTIPLE * MULTIPLE)  # a picture's longer side has room
    return DeepGenSpec(
        family=FAMILY,
        kind="1.0",
        title="DeepGen-1.0",
        defaults={
            "height": side,
            "width": side,
            "num_inference_steps": 50,
            "guidance_scale": 4.0,
            "seed": 42,
            "negative_prompt": "",
        },
        no_effect={
            "max_sequence_length": "its language model reads the whole prompt, whatever its length"
        },
        size_multiple=MULTIPLE,
        limits={"height": largest, "width": largest},
        extras=frozenset({"image", "resize", "reference_latent"}),
    )


@dataclass(frozen=True, kw_only=True)
class DeepGenSpec(ModelSpec):
    """What DeepGen takes: its defaults depend on whether there is a picture to edit."""

    def resolve(self, request: Request) -> Resolved:
        """Fill in what the request leaves out; an edit is as large as its first picture's shape."""
        if request.image is None:
            for name in _FOR_EDITS:
                if (value := getattr(request, name)) is not None:
                    raise NoEffectError(
                        f"{name} has no effect without a picture to edit",
                        seen=value,
                        hint=f"leave out --{name.replace('_', '-')}, or name an --image",
                        setting=name,
                    )
            return super().resolve(request)
        changes: dict[str, Any] = {}
        if request.negative_prompt is None:
            changes["negative_prompt"] = NEGATIVE_EDIT
        changes["resize"] = request.resize or "keep"
        changes["reference_latent"] = request.reference_latent or "sample"
        if changes["resize"] == "keep":
            changes |= _size_of_edit(request, request.image[0], self.defaults["height"])
        resolved = super().resolve(request.replace(**changes))
        notes = _notes_on(resolved, max(self.limits.values()))
        return replace(resolved, notes=(*resolved.notes, *notes))


def fitted_size(image: Reference, request: Resolved) -> tuple[int, int]:
    """Return height and width, multiples of 32, in which an image to edit is read.

    Stretched: those of the request. Else the picture keeps its aspect ratio: it is read in the
    request's own size if its shape rounds to that, and otherwise in about as many pixels (the rule
    of the training, `fix_pixels`: the sides are rounded up).
    """
    height, width = request.height, request.width
    if request.resize == "stretch" or _rounds_to(image, height, width):
        return height, width
    return fixed_pixels(image, height * width)


def fixed_pixels(image: Reference, pixels: int) -> tuple[int, int]:
    """Return the size of about so many pixels with an image's shape, its sides rounded up."""
    scale = math.sqrt(pixels / (image.height * image.width))
    return _round_up(image.height * scale), _round_up(image.width * scale)


def _rounds_to(image: Reference, height: int, width: int) -> bool:
    """Say whether one scale rounds both sides of an image up to these."""
    most = min(height / image.height, width / image.width)
    least = max((height - MULTIPLE) / image.height, (width - MULTIPLE) / image.width)
    return least < most


def _round_up(side: float) -> int:
    return max(1, math.ceil(side / MULTIPLE - 1e-9)) * MULTIPLE


def _size_of_edit(request: Request, image: Reference, side: int) -> dict[str, int]:
    """Return height and width where the request leaves one or both to the picture."""
    height, width = request.height, request.width
    if height is not None and width is not None:
        return {}
    if height is not None:
        return {"width": _round_up(height * image.width / image.height)}
    if width is not None:
        return {"height": _round_up(width * image.height / image.width)}
    height, width = fixed_pixels(image, side * side)
    return {"height": height, "width": width}


def _notes_on(request: Resolved, largest: int) -> tuple[str, ...]:
    """Say what is done to each picture, and refuse those that cannot be read.

    Raises:
        RequestError: a picture is so long and narrow that one side is beyond the transformer.
    """
    notes = []
    for image in request.image:
        height, width = fitted_size(image, request)
        if max(height, width) > largest:
            raise RequestError(
                "a picture to edit is too long and narrow",
                seen=f"{image.name}: {image.width}x{image.height}, read as {width}x{height}",
                allowed=f"sides of up to {largest} pixels at {request.width}x{request.height}",
                hint="cut it, or --resize stretch",
                setting="image",
            )
        notes += [f"{image.name}: {note}" for note in image.notes]
        if (height, width) != (request.height, request.width):
            notes.append(f"{image.name} keeps its shape: it is read in {width}x{height}")
        if height * width > 16 * image.height * image.width:
            notes.append(f"{image.name} is tiny ({image.width}x{image.height}) and is enlarged")
    return tuple(notes)
