"""Is this a picture at all? A gate that needs no reference and no learned metric.

Black and flat are measured by the spread of the values. Pure noise is told from a picture by what
all pictures of something have and noise has not: places near each other look alike. It is measured
twice, between neighbouring pixels, and between the means of tiles of `TILE` pixels that lie two to
four tiles apart; the second finds noise that a decoder has painted, which is smooth as far as the
decoder sees and no farther. How often it errs is measured by `benchmarks/sanity.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

Looks = Literal["picture", "black", "flat", "noise"]

FLAT_DEVIATION = 1.0
"""Standard deviation, in 8-bit levels, at or below which all colours are one."""
BLACK_LEVEL = 8.0
TILE = 8
"""Pixels a side: what one latent of the models here becomes."""
APART = (2, 3, 4)
"""How many tiles apart; a decoder's neighbouring tiles are alike even in noise."""
LEAST_TILES = 256
"""Fewer tiles say nothing by chance: below it, only neighbouring pixels are looked at."""
LEAST_ALIKE = 0.2
"""Correlation of neighbouring pixels below which they know nothing of each other."""
CHANCE = 3.0
"""Of n tiles that know nothing of each other, the correlation is about 1/sqrt(n) by chance; so many
times that is still chance."""


@dataclass(frozen=True, kw_only=True)
class Sanity:
    """What a picture looks like.

    Attributes:
        looks: the finding.
        mean: of all values, in levels.
        deviation: standard deviation of all values from their colour's mean.
        pixels_alike: correlation of neighbouring pixels, the larger of the two directions.
        tiles_alike: the same of the means of tiles some way apart, the largest of all distances,
            of either sign; None where there are too few tiles.
    """

    looks: Looks
    mean: float
    deviation: float
    pixels_alike: float
    tiles_alike: float | None

    @property
    def passed(self) -> bool:
        """Whether it looks like a picture of something."""
        return self.looks == "picture"


def look_at(image: Image) -> Sanity:
    """Measure a picture; RGB, any size."""
    values = np.asarray(image.convert("RGB"), np.float64)
    mean = float(values.mean())
    deviation = float(np.sqrt(values.var(axis=(0, 1)).mean()))
    pixels = _alike(values, 1)
    tiles = _tiles(values)
    enough = tiles.shape[0] * tiles.shape[1] >= LEAST_TILES and min(tiles.shape[:2]) > max(APART)
    tiles_alike = max(_alike(tiles, far) for far in APART) if enough else None
    return Sanity(
        looks=_judge(mean, deviation, pixels, tiles_alike, tiles.shape[0] * tiles.shape[1]),
        mean=mean,
        deviation=deviation,
        pixels_alike=pixels,
        tiles_alike=tiles_alike,
    )


def _judge(mean: float, deviation: float, pixels: float, tiles: float | None, count: int) -> Looks:
    if deviation <= FLAT_DEVIATION:
        return "black" if mean <= BLACK_LEVEL else "flat"
    if pixels < LEAST_ALIKE or (tiles is not None and tiles < CHANCE / math.sqrt(count)):
        return "noise"
    return "picture"


def _tiles(values: NDArray[np.float64]) -> NDArray[np.float64]:
    rows, columns = values.shape[0] // TILE, values.shape[1] // TILE
    cut = values[: rows * TILE, : columns * TILE]
    tiles: NDArray[np.float64] = cut.reshape(rows, TILE, columns, TILE, 3).mean(axis=(1, 3))
    return tiles


def _alike(values: NDArray[np.float64], far: int) -> float:
    """Return the correlation of places so far apart, across or down, whichever is stronger."""
    across = _correlation(values[:, far:], values[:, :-far])
    down = _correlation(values[far:], values[:-far])
    return max(abs(across), abs(down))


def _correlation(first: Any, second: Any) -> float:
    """Return Pearson's correlation of all three colours together, each from its own mean."""
    first = first - first.mean(axis=(0, 1))
    second = second - second.mean(axis=(0, 1))
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale > 0 else 0.0
