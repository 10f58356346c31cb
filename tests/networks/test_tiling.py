"""Decoding in tiles: close to the picture decoded whole, with no seam, in less memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import danqing
from danqing.errors import RequestError
from danqing.networks.tiling import OVERLAP, decode_in_tiles
from danqing.plan.budget import tiles_of

PROMPT = "three blue mountains under a red sun, a boat on the water"


@pytest.mark.parametrize("size", [(64, 64), (40, 96), (33, 47)])
@pytest.mark.parametrize("tile", [32, 40])
def test_what_depends_on_nothing_around_it_is_joined_exactly(
    size: tuple[int, int], tile: int
) -> None:
    latents = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))

    def decode(part: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(part, scale_factor=8.0)

    joined = decode_in_tiles(decode, latents, tile)
    assert joined.shape == (2, 3, 8 * size[0], 8 * size[1])
    assert (joined - decode(latents)).abs().max() < 1e-5


def test_tiles_in_a_picture() -> None:
    """The pocket model's decoder, trained: over 40 dB, and no more along seams than elsewhere."""
    found = {}
    for tile in ("off", "384", "256"):
        with danqing.open("pocket", device="cpu", dtype="float32", tile=tile) as engine:
            picture = engine.generate(PROMPT, seed=1, height=512, width=512).pictures[0]
            found[tile] = np.asarray(picture.image, dtype=float)
            assert picture.provenance.device["tile"] == (0 if tile == "off" else int(tile))
    error = {tile: (found[tile] - found["off"]) ** 2 for tile in ("384", "256")}
    psnr = {tile: 10 * math.log10(255**2 / one.mean()) for tile, one in error.items()}
    assert psnr["256"] > 40
    assert psnr["384"] > psnr["256"]
    steps = {tile: np.abs(np.diff(one, axis=1)).mean(axis=(0, 2)) for tile, one in found.items()}
    beyond = steps["256"] - steps["off"]
    assert beyond.max() < 1  # of 255: nowhere a column where neighbours differ more


def test_sides_to_try() -> None:
    assert tiles_of(128, 128) == [96, 80, 64, 48, 40, 32]
    assert all(side > 2 * OVERLAP for side in tiles_of(64, 256))
    assert tiles_of(32, 32) == []


@pytest.mark.parametrize("tile", ["31", "wide", "-5", "0"])
def test_no_such_tile(tile: str) -> None:
    with pytest.raises(RequestError, match="invalid tile size"):
        danqing.open("pocket", device="cpu", tile=tile)
