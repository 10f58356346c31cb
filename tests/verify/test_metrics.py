"""The measures between pictures, against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from danqing.errors import RequestError
from danqing.verify.metrics import (
    compare,
    difference_picture,
    histogram,
    ssim,
    visible_factor,
)


def noisy(size: tuple[int, int], strength: float, seed: int = 0) -> tuple[Image.Image, Image.Image]:
    random = np.random.default_rng(seed)
    width, height = size
    first = random.integers(0, 256, (height, width, 3)).astype(np.float64)
    second = np.clip(first + random.normal(0, strength, first.shape), 0, 255)
    return Image.fromarray(first.astype(np.uint8)), Image.fromarray(second.astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 48), (128, 128), (11, 40)])
@pytest.mark.parametrize("strength", [0.6, 10.0, 90.0])
def test_measures_agree_with_scikit_image(size: tuple[int, int], strength: float) -> None:
    first, second = noisy(size, strength)
    found = compare(first, second)
    a, b = np.asarray(first), np.asarray(second)
    assert found["mse"] == pytest.approx(mean_squared_error(a, b), rel=1e-12)
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-12)
    expected = structural_similarity(
        a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=255,
    )  # fmt: skip
    assert found["ssim"] == pytest.approx(expected, rel=1e-9)
    away = np.abs(a.astype(int) - b)
    assert found.largest == away.max()
    assert found["mean"] == pytest.approx(away.mean())


def test_equal_pictures() -> None:
    image, _ = noisy((32, 32), 1)
    found = compare(image, image.copy())
    assert (found["mse"], found.largest, found.psnr) == (0, 0, math.inf)
    assert found["ssim"] == pytest.approx(1)


def test_a_picture_narrower_than_the_window_is_measured_whole() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 256, (5, 40, 3)).astype(np.float64)
    assert ssim(values, values) == pytest.approx(1)
    assert ssim(values, 255 - values) < 0.1


def test_other_sizes_are_refused() -> None:
    with pytest.raises(RequestError, match="32x32 and 16x32"):
        compare(Image.new("RGB", (32, 32)), Image.new("RGB", (16, 32)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20), st.integers(1, 16))
def test_histogram_and_difference_picture(seed: int, width: int, height: int, factor: int) -> None:
    random = np.random.default_rng(seed)
    one, other = random.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    first, second = Image.fromarray(one), Image.fromarray(other)
    counts = histogram(first, second)
    away = np.abs(one.astype(int) - other.astype(int))
    assert sum(counts) == away.size
    assert len(counts) - 1 == away.max() == compare(first, second).largest
    levels = np.arange(len(counts))
    assert (levels * counts).sum() / away.size == pytest.approx(compare(first, second)["mean"])
    assert (levels**2 * counts).sum() / away.size == pytest.approx(compare(first, second)["mse"])
    shown = np.asarray(difference_picture(first, second, factor=factor)).astype(int)
    assert np.array_equal(shown, np.minimum(away * factor, 255))
    assert histogram(first, first) == (away.size,)


@pytest.mark.parametrize(("largest", "factor"), [(0, 1), (1, 128), (2, 64), (28, 8), (255, 1)])
def test_a_difference_is_made_visible(largest: int, factor: int) -> None:
    assert visible_factor(largest) == factor
    assert largest * factor <= 255


def test_pictures_of_different_sizes_have_no_difference() -> None:
    for measure in (histogram, difference_picture, compare):
        with pytest.raises(RequestError, match="different sizes"):
            measure(Image.new("RGB", (3, 4)), Image.new("RGB", (4, 3)))


def test_a_thousand_pairs_agree_with_scikit_image() -> None:
    random = np.random.default_rng(7)
    for number in range(1000):
        size = (int(random.integers(11, 33)), int(random.integers(11, 33)))
        first, second = noisy(size, float(random.uniform(0.5, 120)), seed=number)
        found, a, b = compare(first, second), np.asarray(first), np.asarray(second)
        if found.largest:
            assert found.psnr == pytest.approx(peak_signal_noise_ratio(b, a), rel=1e-9)
        wanted = structural_similarity(
            a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=255,
        )  # fmt: skip
        assert found["ssim"] == pytest.approx(wanted, abs=1e-9)
