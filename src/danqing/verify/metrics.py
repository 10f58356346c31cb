"""Measures between two pictures of equal size; plain functions of pixels, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from danqing.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Values = NDArray[np.float64]

_WINDOW_SIGMA = 1.5
_WINDOW_RADIUS = 5
_LUMINANCE_CONSTANT = (0.01 * 255) ** 2
_CONTRAST_CONSTANT = (0.03 * 255) ** 2


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two pictures are apart, in 8-bit levels.

    Attributes:
        mse: mean squared difference.
        largest: the largest difference of any value.
        mean: mean absolute difference.
        psnr: peak signal-to-noise ratio in dB; infinite for equal pictures.
        ssim: structural similarity, 1 for equal pictures.
    """

    mse: float
    largest: int
    mean: float
    psnr: float
    ssim: float


def compare(candidate: Image, reference: Image) -> Difference:
    """Measure two RGB pictures of equal size.

    Raises:
        RequestError: their sizes differ.
    """
    if candidate.size != reference.size:
        raise RequestError(
            "pictures of different sizes cannot be compared",
            seen="{}x{} and {}x{}".format(*candidate.size, *reference.size),
        )
    first, second = (np.asarray(one.convert("RGB"), np.float64) for one in (candidate, reference))
    away = np.abs(first - second)
    error = float(np.square(away).mean())
    return Difference(
        mse=error,
        largest=int(away.max()),
        mean=float(away.mean()),
        psnr=psnr(error),
        ssim=ssim(first, second),
    )


def psnr(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of 8-bit pictures with this squared error."""
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def ssim(first: Values, second: Values) -> float:
    """Return the mean structural similarity of two (height, width, 3) pictures, 0 to 255.

    Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, 2004: a Gaussian window of 11 x 11
    with a standard deviation of 1.5, population variances, the window inside the picture, the mean
    over colours. Pictures narrower than the window are measured as one window.
    """
    if min(first.shape[:2]) <= 2 * _WINDOW_RADIUS:
        return float(
            np.mean(
                [_similarity(*_moments_of_all(first[..., c], second[..., c])) for c in range(3)]
            )
        )
    mean_1, mean_2 = _blur(first), _blur(second)
    var_1 = _blur(first * first) - mean_1 * mean_1
    var_2 = _blur(second * second) - mean_2 * mean_2
    both = _blur(first * second) - mean_1 * mean_2
    return float(np.mean(_similarity(mean_1, mean_2, var_1, var_2, both)))


def _moments_of_all(first: Values, second: Values) -> tuple[Any, ...]:
    mean_1, mean_2 = first.mean(), second.mean()
    both = ((first - mean_1) * (second - mean_2)).mean()
    return mean_1, mean_2, first.var(), second.var(), both


def _similarity(mean_1: Any, mean_2: Any, var_1: Any, var_2: Any, both: Any) -> Any:
    light = (2 * mean_1 * mean_2 + _LUMINANCE_CONSTANT) / (
        mean_1**2 + mean_2**2 + _LUMINANCE_CONSTANT
    )
    structure = (2 * both + _CONTRAST_CONSTANT) / (var_1 + var_2 + _CONTRAST_CONSTANT)
    return light * structure


def _blur(values: Values) -> Values:
    """Return windowed means where the window lies inside: 5 rows and columns fewer a side."""
    offsets = np.arange(-_WINDOW_RADIUS, _WINDOW_RADIUS + 1)
    weights = np.exp(-0.5 * np.square(offsets / _WINDOW_SIGMA))
    weights /= weights.sum()
    height, width = (length - 2 * _WINDOW_RADIUS for length in values.shape[:2])
    rows = sum(weight * values[k : k + height] for k, weight in enumerate(weights))
    blurred: Values = sum(weight * rows[:, k : k + width] for k, weight in enumerate(weights))
    return blurred
