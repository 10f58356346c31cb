"""The sanity gate: photographs pass, what is no picture does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import danqing
from danqing.arrays import Array
from danqing.verify.sanity import look_at

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "page.png")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("side", [None, 512, 128, 64])
def test_photographs_pass(name: str, side: int | None) -> None:
    """They come with scikit-image."""
    import skimage

    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    assert look_at(image if side is None else image.resize((side, side))).passed


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64, 200]), st.floats(3, 60))
def test_noise_does_not(seed: int, side: int, deviation: float) -> None:
    random = np.random.default_rng(seed)
    normal = random.normal(128, deviation, (side, side, 3)).clip(0, 255).astype(np.uint8)
    assert look_at(Image.fromarray(normal)).looks == "noise"


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 255)] * 3), st.integers(1, 90), st.integers(1, 90))
def test_one_colour_does_not(colour: tuple[int, int, int], width: int, height: int) -> None:
    found = look_at(Image.new("RGB", (width, height), colour))
    assert found.looks in {"black", "flat"}
    assert (found.looks == "black") == (sum(colour) / 3 <= 8)


def test_decoded_noise_does_not() -> None:
    """Latents that were never denoised, through a real decoder: smooth, and no picture."""
    random = np.random.default_rng(0)

    def noise(name: str, array: Array) -> Array | None:
        if not name.startswith("denoise/") or not name.endswith("latents"):
            return None
        return Array("float32", random.standard_normal(array.bits.shape).astype(np.float32))

    request = danqing.Request(prompt="a boat", seed=1, num_inference_steps=1)
    with danqing.open("pocket", device="cpu", dtype="float32") as engine:
        assert look_at(engine.probe(request, noise).image).looks == "noise"
        assert look_at(engine.generate(request.replace(num_inference_steps=4)).image).passed
