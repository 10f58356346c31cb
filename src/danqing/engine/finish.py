"""From pixels to an image: conversion, checks, and what computing together did to the bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing.errors import BrokenPictureError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def to_image(pixels: torch.Tensor) -> Image:
    """Turn (3, height, width) from -1..1 into 8 bits, rounded to nearest as diffusers does."""
    from PIL import Image as Images

    unit = (pixels.cpu().float() / 2 + 0.5).clamp(0, 1)
    levels = (unit * 255).round().byte().permute(1, 2, 0).contiguous()
    return Images.fromarray(levels.numpy())


def check_image(image: Image) -> None:
    """Refuse a picture of a single colour; every stage before was finite."""
    ranges: Any = image.getextrema()
    if any(low != high for low, high in ranges):
        return
    colour = tuple(low for low, _ in ranges)
    what = "black" if not any(colour) else "one flat colour"
    raise BrokenPictureError(
        f"the picture is {what}",
        seen=f"every pixel is RGB {colour}; all stages gave finite numbers",
        hint="the weights may be wrong for this model; or try --dtype float32",
    )


def compare_bits(alone: Image, together: Image) -> dict[str, Any]:
    """Compare the pixels of one picture made alone and in a batch."""
    from PIL import ImageChops

    ranges: Any = ImageChops.difference(alone, together).getextrema()
    largest = max(high for _, high in ranges)
    return {"bits": "close" if largest else "identical", "max_pixel_difference": largest}
