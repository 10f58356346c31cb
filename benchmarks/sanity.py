"""How often does the sanity gate err? On real pictures, and on broken ones.

    python benchmarks/sanity.py

Real: the photographs and scans that come with scikit-image and matplotlib, whole, cut out at 512,
256, 128 and 64 pixels, and shrunk to those; and pictures of the pocket model. Broken: black, flat,
uniform and normal noise, noise decoded by the pocket model's VAE, untrained transformers' output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from danqing.verify.sanity import look_at

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = (512, 256, 128, 64)
TEXTURES = ("grass", "gravel", "hubble")
"""A lawn, gravel, stars: each place knows nothing of the next."""
PROMPTS = (
    "three blue mountains under a red sun, a boat on the water",
    "mountains in mist at night",
    "a red circle above a blue square",
    "green triangle left of a yellow circle",
    "two mountains in winter, snow, a moon",
)


def photographs() -> Iterator[tuple[str, Image.Image]]:
    import matplotlib as mpl
    import skimage

    for folder in (
        Path(skimage.__file__).parent / "data",
        Path(mpl.get_data_path()) / "sample_data",
    ):
        for path in sorted(folder.iterdir()):
            if path.suffix in {".png", ".jpg"}:
                yield path.name, Image.open(path).convert("RGB")


def real(cuts: int, *, textures: bool) -> Iterator[tuple[str, Image.Image]]:
    random = np.random.default_rng(0)
    for name, image in photographs():
        if name.startswith(TEXTURES) != textures:
            continue
        yield f"whole {name}", image
        for side in SIZES:
            if min(image.size) < side:
                continue
            yield f"shrunk to {side}: {name}", image.resize((side, side), Image.Resampling.LANCZOS)
            for _ in range(cuts if min(image.size) > side else 0):
                left = int(random.integers(0, image.width - side + 1))
                top = int(random.integers(0, image.height - side + 1))
                cut = image.crop((left, top, left + side, top + side))
                yield f"cut of {side}: {name} at {left}, {top}", cut


def painted(count: int) -> Iterator[tuple[str, Image.Image]]:
    import danqing

    with danqing.open("pocket", device="cpu") as engine:
        for seed in range(count):
            prompt = PROMPTS[seed % len(PROMPTS)]
            yield f"{prompt}, seed {seed}", engine.generate(prompt, seed=seed).image


def broken(count: int) -> Iterator[tuple[str, Image.Image]]:
    random = np.random.default_rng(1)
    for side in SIZES:
        yield f"black {side}", Image.new("RGB", (side, side))
        yield f"flat {side}", Image.new("RGB", (side, side), "teal")
        for _ in range(count):
            uniform = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            yield f"uniform noise {side}", Image.fromarray(uniform)
            normal = random.normal(128, random.uniform(4, 60), (side, side, 3)).clip(0, 255)
            yield f"normal noise {side}", Image.fromarray(normal.astype(np.uint8))
            grey = random.integers(0, 256, (side, side, 1), dtype=np.uint8).repeat(3, axis=2)
            yield f"grey noise {side}", Image.fromarray(grey)


def decoded(count: int) -> Iterator[tuple[str, Image.Image]]:
    """Noise that was never denoised: what a transformer that gives zero leads to."""
    import danqing
    from danqing.arrays import Array

    def nothing(name: str, array: Array) -> Array | None:
        if name.startswith("denoise/") and name.endswith("latents"):
            noise = random.standard_normal(array.bits.shape).astype(np.float32)
            return Array("float32", noise)
        return None

    random = np.random.default_rng(2)
    with danqing.open("pocket", device="cpu", dtype="float32") as engine:
        for seed in range(count):
            request = danqing.Request(prompt=PROMPTS[0], seed=seed, num_inference_steps=1)
            yield f"decoded noise, seed {seed}", engine.probe(request, nothing).image


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--painted", type=int, default=100)
    arguments = parser.parse_args()
    print(
        "| what | pictures | called black or flat | called noise | share |\n|---|---|---|---|---|"
    )
    groups = (
        ("photographs, drawings, scans", real(arguments.cuts, textures=False), True),
        ("a lawn, gravel, stars", real(arguments.cuts, textures=True), True),
        ("of the pocket model", painted(arguments.painted), True),
        ("black, flat, noise", broken(50), False),
        ("noise decoded by the pocket model", decoded(100), False),
    )
    wrong: list[str] = []
    for title, pictures, sound in groups:
        found = [(name, look_at(image)) for name, image in pictures]
        called = [(name, seen) for name, seen in found if not seen.passed]
        share = len(called) / len(found)
        noise = sum(seen.looks == "noise" for _, seen in called)
        row = f"| {title} | {len(found)} | {len(called) - noise} | {noise} | {100 * share:.2f} % |"
        print(row, flush=True)
        wrong += [f"{name}: {seen}" for name, seen in found if seen.passed != sound]
    print(f"\n{len(wrong)} wrong:", file=sys.stderr)
    for line in wrong:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
