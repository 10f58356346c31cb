"""What each family gives the model contract: a toy written by others, and an oracle of others.

A new family adds a row here; `contract.py` fails as long as one is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests import deepgen_reference, deepgen_toys, sd3_toys, toys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from danqing.request import Resolved

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    """One variant of a family.

    Attributes:
        family: its key in `danqing.models.FAMILIES`.
        name: of the variant.
        toy: writes a toy checkpoint into a folder, with diffusers' and transformers' own writers.
        reference: images by a foreign implementation; of the toy's folder, the request with every
            field filled in, and the noise; (height, width, 3).
        levels: how many 8-bit levels the images may differ from it; 0 is bit for bit.
        noise: shape of the initial noise of an image of 64 x 96, in float32.
        unknown: a setting of `Request` that the family refuses, with a value.
    """

    family: str
    name: str
    toy: Callable[[Path], Path]
    reference: Callable[[Path, Resolved, torch.Tensor], Pixels]
    levels: int
    noise: tuple[int, ...]
    unknown: tuple[str, Any]


def flux_reference(folder: Path, request: Resolved, noise: torch.Tensor) -> Pixels:
    """Run diffusers' FluxPipeline."""
    from danqing.models.flux.sampling import pack

    guidance = {"guidance_scale": request.guidance_scale} if request.guidance_scale else {}
    image = toys.open_with_diffusers(folder)(
        request.prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        max_sequence_length=request.max_sequence_length,
        latents=pack(noise),
        **guidance,
    ).images[0]
    return np.asarray(image)


def deepgen_reference_image(folder: Path, request: Resolved, noise: torch.Tensor) -> Pixels:
    """Run DeepGen put together from stock parts."""
    pixels = deepgen_reference.paint(
        deepgen_reference.load(folder),
        request.prompt,
        request.negative_prompt,
        noise,
        steps=request.num_inference_steps,
        guidance=request.guidance_scale,
    )
    levels = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round()
    return levels.permute(1, 2, 0).numpy().astype(np.uint8)


def sd3_reference(folder: Path, request: Resolved, noise: torch.Tensor) -> Pixels:
    """Run diffusers' StableDiffusion3Pipeline."""
    image = sd3_toys.open_with_diffusers(folder)(
        request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        max_sequence_length=request.max_sequence_length,
        latents=noise,
    ).images[0]
    return np.asarray(image)


def write_dev(folder: Path) -> Path:
    """Write a FLUX.1-dev, which takes a guidance scale."""
    return toys.write_diffusers(folder, guided=True, seed=1)


ROWS = (
    FamilyRow(
        family="flux1", name="schnell", toy=toys.write_diffusers, reference=flux_reference,
        levels=0, noise=(1, 16, 8, 12), unknown=("guidance_scale", 3.0),
    ),
    FamilyRow(
        family="flux1", name="dev", toy=write_dev, reference=flux_reference, levels=0,
        noise=(1, 16, 8, 12), unknown=("negative_prompt", "blurry"),
    ),
    FamilyRow(
        family="deepgen", name="deepgen", toy=deepgen_toys.write,
        reference=deepgen_reference_image, levels=1, noise=(1, 16, 8, 12),
        unknown=("max_sequence_length", 128),
    ),
    FamilyRow(
        family="sd3", name="sd3.5-medium", toy=sd3_toys.write, reference=sd3_reference, levels=0,
        noise=(1, 16, 8, 12), unknown=("resize", "stretch"),
    ),
)  # fmt: skip
