"""The distance between tensors: its properties, and numpy's and torch's own numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from danqing.arrays import Array
from danqing.errors import RequestError
from danqing.verify.metrics import distance, psnr, ssim

FINITE = arrays.arrays(
    np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
)


def array(values: np.ndarray) -> Array:
    return Array(str(values.dtype), values)


def bfloat16(values: torch.Tensor) -> Array:
    return Array("bfloat16", values.bfloat16().view(torch.uint16).numpy())


@given(FINITE)
def test_nothing_is_apart_from_itself(values: np.ndarray) -> None:
    found = distance(array(values), array(values.copy()))
    assert (found.largest, found.mean, found.mse, found.relative, found.ulps) == (0, 0, 0, 0, 0)
    assert found.cosine == pytest.approx(1)
    assert found.not_finite == 0


@given(FINITE, FINITE)
def test_properties(first: np.ndarray, second: np.ndarray) -> None:
    found, back = distance(array(first), array(second)), distance(array(second), array(first))
    assert (found.largest, found.mean, found.ulps) == (back.largest, back.mean, back.ulps)
    assert found.cosine == pytest.approx(back.cosine, abs=1e-12)
    assert found.mean <= found.largest or found.largest == 0
    assert found.mse <= found.largest**2 * (1 + 1e-12)
    assert -1 <= found.cosine <= 1
    assert (found.largest == 0) == (found.relative == 0)


@given(FINITE, FINITE)
def test_numbers_are_numpy_s(first: np.ndarray, second: np.ndarray) -> None:
    found = distance(array(first), array(second))
    a, b = first.astype(np.float64), second.astype(np.float64)
    assert found.mse == pytest.approx(np.mean((a - b) ** 2))
    if np.linalg.norm(b):
        assert found.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_one_step_to_the_next_number_is_one_ulp(dtype: type) -> None:
    values: Any = np.array([1.0, -1.0, 0.0, 1e-3, -65000.0, 3.14], dtype)
    for steps, towards in ((1, np.inf), (1, -np.inf)):
        moved = np.nextafter(values, dtype(towards))
        assert distance(array(moved.astype(dtype)), array(values)).ulps == steps
    assert distance(array(np.array([-0.0], dtype)), array(np.array([0.0], dtype))).ulps == 0


def test_ulps_are_of_the_coarser_dtype() -> None:
    wide = torch.tensor([1.0, 1.0 + 2**-7, -2.0])
    assert distance(bfloat16(wide), array(wide.numpy())).ulps == 0
    assert distance(bfloat16(wide + torch.tensor([2**-7, 0, 0])), array(wide.numpy())).ulps == 1


def test_bfloat16_is_read_as_torch_reads_it() -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    found = bfloat16(values)
    assert np.array_equal(found.values(), values.bfloat16().double().numpy())
    assert found.data() == values.bfloat16().view(torch.uint8).numpy().tobytes()


def test_what_is_not_finite_is_counted_not_averaged() -> None:
    first = np.array([1.0, math.nan, math.inf, 4.0])
    found = distance(array(first), array(np.array([1.0, 2.0, 3.0, 5.0])))
    assert (found.not_finite, found.largest, found.ulps) == (2, 1, None)
    assert math.isnan(distance(array(first[1:2]), array(first[3:])).largest)


def test_zeros() -> None:
    zero, one = array(np.zeros(3)), array(np.ones(3))
    assert distance(zero, zero).cosine == 1
    assert distance(one, zero).relative == math.inf
    assert distance(zero, one).cosine == 0


def test_shapes_must_agree() -> None:
    with pytest.raises(RequestError, match="different shapes"):
        distance(array(np.zeros(3)), array(np.zeros(4)))


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), width=st.integers(11, 40), height=st.integers(11, 40),
    strength=st.floats(0.01, 200),
)  # fmt: skip
def test_a_thousand_pairs_against_scikit_image(
    seed: int, width: int, height: int, strength: float
) -> None:
    random = np.random.default_rng(seed)
    first = random.integers(0, 256, (height, width, 3)).astype(np.float64)
    second = np.clip(first + random.normal(0, strength, first.shape), 0, 255).round()
    expected = structural_similarity(
        first, second, channel_axis=-1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=255,
    )  # fmt: skip
    assert ssim(first, second) == pytest.approx(expected, abs=1e-9)
    if (first != second).any():
        theirs = peak_signal_noise_ratio(first, second, data_range=255)
        assert psnr(float(np.mean((first - second) ** 2))) == pytest.approx(theirs, rel=1e-9)
