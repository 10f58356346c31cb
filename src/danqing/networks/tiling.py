"""Latents decoded in overlapping tiles, for pictures whose decoding would not fit in one piece.

Each tile's group norms see the tile alone, so tiles differ a little in tone; over the overlap one
fades into the next. On the pocket model tiles of half the side are 40 to 43 dB from the picture
decoded whole, larger ones more (decision 0015); so the largest that fit are taken.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

OVERLAP = 8
"""Latents that neighbouring tiles share, at least; a pixel depends on about as many around it."""


def decode_in_tiles(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, tile: int
) -> torch.Tensor:
    """Decode tile by tile, and join what comes out.

    Args:
        decode: of (pictures, channels, height, width), pixels of a multiple of that size.
        latents: (pictures, channels, height, width).
        tile: side in latents; latents that fit in one tile are decoded whole.

    Returns:
        What `decode` would give, (pictures, 3, ...), in its dtype.
    """
    height, width = latents.shape[-2:]
    rows, columns = _starts(height, tile), _starts(width, tile)
    if len(rows) == len(columns) == 1:
        return decode(latents)
    joined = total = None
    dtype = latents.dtype
    for top in rows:
        for left in columns:
            part = latents[..., top : top + tile, left : left + tile]
            pixels = decode(part)
            scale, dtype = pixels.shape[-1] // part.shape[-1], pixels.dtype
            if joined is None or total is None:
                size = (height * scale, width * scale)
                joined = torch.zeros((*pixels.shape[:-2], *size), device=pixels.device)
                total = torch.zeros(size, device=pixels.device)
            down = slice(top * scale, top * scale + pixels.shape[-2])
            across = slice(left * scale, left * scale + pixels.shape[-1])
            weight = torch.outer(
                _ramp(pixels.shape[-2], top > 0, top + tile < height, OVERLAP * scale),
                _ramp(pixels.shape[-1], left > 0, left + tile < width, OVERLAP * scale),
            ).to(pixels.device)
            joined[..., down, across] += pixels.float() * weight
            total[down, across] += weight
    if joined is None or total is None:
        msg = "there are no tiles"
        raise AssertionError(msg)
    return (joined / total).to(dtype)


def _starts(length: int, tile: int) -> list[int]:
    """Return where tiles begin, spread evenly, each sharing `OVERLAP` or more with the next."""
    if length <= tile:
        return [0]
    count = math.ceil((length - OVERLAP) / (tile - OVERLAP))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, before: bool, after: bool, overlap: int) -> torch.Tensor:  # noqa: FBT001
    """Return weights that rise from a neighbour before, and fall towards one after."""
    rising = (torch.arange(overlap) + 0.5) / overlap
    weights = torch.ones(length)
    if before:
        weights[:overlap] = rising
    if after:
        weights[-overlap:] = rising.flip(0)
    return weights
