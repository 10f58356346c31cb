"""Metrics of two images, or two tensors, of equal size; plain functions, in float64.

`METRICS` is the table of the metrics of two images. The verdict of `verify parity`, the report, its
JSON schema and its page follow it: to add a metric is to add a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from danqing.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from PIL.Image import Image

    from danqing.arrays import Array

    Values = NDArray[np.float64]

_WINDOW_SIGMA = 1.5
_WINDOW_RADIUS = 5
_LUMINANCE_CONSTANT = (0.01 * 255) ** 2
_CONTRAST_CONSTANT = (0.03 * 255) ** 2


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of `METRICS`.

    Attributes:
        name: in `Difference` and in the report's JSON.
        measure: computes it from two images of shape (height, width, 3), 0 to 255; None if it is
            computed elsewhere and put into the table's values (LPIPS needs weights).
        better: which direction is closer to the reference.
        format: of its number.
        unit: after the number.
        words: its name for people, in English and Chinese.
        meaning: one line for the JSON schema.
        verdict_name: in the JSON of `verify parity`, where it differs from `name`.
        infinite: whether equal images give infinity, which JSON writes as null.
        added: it is not in reports written by the first versions, which may lack it.
    """

    name: str
    measure: Callable[[Values, Values], float] | None
    better: Literal["lower", "higher"]
    format: str
    unit: str = ""
    words: tuple[str, str]
    meaning: str
    verdict_name: str = ""
    infinite: bool = False
    added: bool = True

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return self.format.endswith("d")

    @property
    def nullable(self) -> bool:
        """Whether a report may have null: the metric may be infinite, or may not be measured."""
        return self.added or self.infinite

    def text(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{value:{self.format}}{' ' * bool(self.unit)}{self.unit}"


@dataclass(frozen=True)
class Difference:
    """How far two images are apart: a value for each metric that was measured."""

    values: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        """Return the value of a metric."""
        return self.values[name]

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB; infinite for equal images."""
        return self.values["psnr_db"]

    @property
    def largest(self) -> int:
        """The largest difference of any value, in 8-bit levels."""
        return int(self.values["largest"])

    @property
    def identical(self) -> bool:
        """Whether every pixel is equal."""
        return not self.largest

    def as_dict(self) -> dict[str, float | None]:
        """Return the values under their names in a verdict; null for an infinite one."""
        rows = {row.name: row.verdict_name or row.name for row in METRICS}
        return {
            rows[name]: value if math.isfinite(value) else None
            for name, value in self.values.items()
        }

    def __str__(self) -> str:
        """Return the values as one line for people."""
        return ", ".join(
            f"{row.words[0]} {row.text(self.values[row.name])}"
            for row in METRICS
            if row.name in self.values
        )


def compare(candidate: Image, reference: Image) -> Difference:
    """Measure two RGB images of equal size.

    Raises:
        RequestError: their sizes differ.
    """
    _levels_apart(candidate, reference)
    first, second = (np.asarray(one.convert("RGB"), np.float64) for one in (candidate, reference))
    return Difference(
        {row.name: row.measure(first, second) for row in METRICS if row.measure is not None}
    )


def histogram(candidate: Image, reference: Image) -> tuple[int, ...]:
    """Return how many of the values (three a pixel) differ by 0, 1, ... levels, up to the largest.

    Raises:
        RequestError: their sizes differ.
    """
    return tuple(int(count) for count in np.bincount(_levels_apart(candidate, reference).ravel()))


def difference_picture(candidate: Image, reference: Image, *, factor: int = 1) -> Image:
    """Return the absolute difference of each value, times a factor, cut off at 255.

    Black is equal. The factor makes small differences visible; say it beside the picture.

    Raises:
        RequestError: their sizes differ.
    """
    from PIL import Image as Images

    away = _levels_apart(candidate, reference).astype(np.int64) * factor
    return Images.fromarray(np.minimum(away, 255).astype(np.uint8))


def visible_factor(largest: int) -> int:
    """Return the power of two that brings a largest difference closest to white, at least 1."""
    return 1 if largest <= 0 else 2 ** max(0, int(math.log2(255 / largest)))


def _levels_apart(candidate: Image, reference: Image) -> NDArray[np.int16]:
    if candidate.size != reference.size:
        raise RequestError(
            "pictures of different sizes cannot be compared",
            seen="{}x{} and {}x{}".format(*candidate.size, *reference.size),
        )
    first, second = (np.asarray(one.convert("RGB"), np.int16) for one in (candidate, reference))
    away: NDArray[np.int16] = np.abs(first - second)
    return away


def mse(first: Values, second: Values) -> float:
    """Return the mean squared difference."""
    return float(np.square(first - second).mean())


def _largest(first: Values, second: Values) -> int:
    return int(np.abs(first - second).max())


def _mean(first: Values, second: Values) -> float:
    return float(np.abs(first - second).mean())


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


METRICS: list[Metric] = [
    Metric(
        name="mse", measure=mse, better="lower", format=".6f", words=("MSE", "MSE"),
        meaning="mean squared difference", added=False,
    ),
    Metric(
        name="largest", measure=_largest, better="lower", format="d",
        words=("largest pixel difference", "最大像素差"), verdict_name="largest_difference",
        meaning="largest difference of a value, in 8-bit levels", added=False,
    ),
    Metric(
        name="mean", measure=_mean, better="lower", format=".4f",
        words=("mean pixel difference", "平均像素差"), verdict_name="mean_difference",
        meaning="mean absolute difference", added=False,
    ),
    Metric(
        name="psnr_db", measure=lambda first, second: psnr(mse(first, second)), better="higher",
        format=".2f", unit="dB", words=("PSNR", "PSNR"),
        meaning="peak signal-to-noise ratio; null for equal images: it is infinite",
        infinite=True, added=False,
    ),
    Metric(
        name="ssim", measure=ssim, better="higher", format=".6f", words=("SSIM", "SSIM"),
        meaning="structural similarity, 1 for equal images", added=False,
    ),
    Metric(
        name="lpips", measure=None, better="lower", format=".4f", words=("LPIPS", "LPIPS"),
        meaning="learned distance, if its weights were passed",
    ),
]  # fmt: skip
"""The metrics of two images, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the values of a tensor are like; of the finite ones, in float64.

    Attributes:
        dtype: PyTorch's name.
        shape: sides.
        least: smallest value; None if none is finite.
        most: largest value.
        mean: of all.
        deviation: standard deviation.
        zeros: share of values that are zero, 0 to 1.
        not_finite: how many values are NaN or infinite.
    """

    dtype: str
    shape: tuple[int, ...]
    least: float | None
    most: float | None
    mean: float | None
    deviation: float | None
    zeros: float
    not_finite: int


def statistics_of(array: Array) -> Statistics:
    """Measure the values of a tensor."""
    values = array.values()
    finite = values[np.isfinite(values)]
    some = finite.size > 0
    return Statistics(
        dtype=array.dtype,
        shape=array.shape,
        least=float(finite.min()) if some else None,
        most=float(finite.max()) if some else None,
        mean=float(finite.mean()) if some else None,
        deviation=float(finite.std()) if some else None,
        zeros=float((values == 0).mean()) if values.size else 0.0,
        not_finite=values.size - finite.size,
    )


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a tensor is from a reference of the same shape.

    Attributes:
        largest: largest absolute difference.
        mean: mean absolute difference.
        mse: mean squared difference.
        relative: L2 norm of the difference over that of the reference; infinite if that is zero.
        cosine: cosine of the angle between the two, as vectors; 1 if both are zero.
        ulps: largest number of representable values between two entries, in the coarser of the
            dtypes; None where something is not finite.
        not_finite: entries of the candidate that are NaN or infinite where the reference's are not.
    """

    largest: float
    mean: float
    mse: float
    relative: float
    cosine: float
    ulps: int | None
    not_finite: int


def distance(candidate: Array, reference: Array) -> Distance:
    """Measure a tensor against a reference, in float64.

    Raises:
        RequestError: their shapes differ.
    """
    if candidate.shape != reference.shape:
        raise RequestError(
            "tensors of different shapes cannot be compared",
            seen=f"{list(candidate.shape)} and {list(reference.shape)}",
        )
    first, second = candidate.values(), reference.values()
    sound = np.isfinite(first) & np.isfinite(second)
    bad = int((~np.isfinite(first) & np.isfinite(second)).sum())
    first, second = first[sound], second[sound]
    if not first.size:
        return Distance(
            largest=math.nan, mean=math.nan, mse=math.nan, relative=math.nan, cosine=math.nan,
            ulps=None, not_finite=bad,
        )  # fmt: skip
    away = first - second
    norm_1, norm_2, norm = (float(np.linalg.norm(one)) for one in (first, second, away))
    return Distance(
        largest=float(np.abs(away).max()),
        mean=float(np.abs(away).mean()),
        mse=float(np.square(away).mean()),
        relative=norm / norm_2 if norm_2 else (math.inf if norm else 0.0),
        cosine=_cosine(first, second, norm_1, norm_2),
        ulps=_ulps(candidate, reference) if sound.all() else None,
        not_finite=bad,
    )


def _cosine(first: Values, second: Values, norm_1: float, norm_2: float) -> float:
    if not norm_1 or not norm_2:
        return 1.0 if norm_1 == norm_2 else 0.0
    cosine = float(np.dot((first / norm_1).ravel(), (second / norm_2).ravel()))
    return max(-1.0, min(1.0, cosine))


_COARSE = ("bfloat16", "float16", "float32", "float64")


def _ulps(candidate: Array, reference: Array) -> int:
    """Return the largest distance in units in the last place, in the coarser dtype.

    Bits of a float, read as a whole number with the sign folded in, count its values in order.
    """
    dtypes = {candidate.dtype, reference.dtype}
    dtype = next((name for name in _COARSE if name in dtypes), None)
    if dtype is None:
        return int(np.abs(candidate.bits - reference.bits).max())
    first, second = (_ordered(one.values(), dtype) for one in (candidate, reference))
    return int(np.abs(first - second).max())


def _ordered(values: Values, dtype: str) -> NDArray[np.int64]:
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> 16
        whole, sign = rounded.astype(np.int64), 1 << 15
    elif dtype == "float16":
        whole, sign = values.astype(np.float16).view(np.uint16).astype(np.int64), 1 << 15
    elif dtype == "float32":
        whole, sign = values.astype(np.float32).view(np.uint32).astype(np.int64), 1 << 31
    else:
        whole = values.view(np.int64)
        folded: NDArray[np.int64] = np.where(whole < 0, np.int64(-(2**63)) - whole, whole)
        return folded
    counted: NDArray[np.int64] = np.where(whole >= sign, sign - whole, whole)
    return counted
