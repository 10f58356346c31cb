"""The references of `danqing doctor --paint`, and the noise floor its limits come from."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Any

import torch

import danqing
from danqing.pocket.suite import CASES
from danqing.verify.metrics import compare

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")
LEAST_FOR_FLOAT32 = 60.0
"""dB; another CPU or version of torch gives other last bits, a level here and there."""


def write(folder: Path) -> None:
    """Paint the suite in float32, and once in each dtype to see what that costs."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[Any]] = {}
    chip = ""
    for dtype in DTYPES:
        with danqing.open("pocket", device="cpu", dtype=dtype) as engine:
            pictures[dtype] = [engine.generate(case.prompt, seed=case.seed).image for case in CASES]
            chip = engine.plan.chip
    for case, image in zip(CASES, pictures["float32"], strict=True):
        image.save(folder / f"{case.name}.png", optimize=True)
    floor = {
        dtype: min(
            LEAST_FOR_FLOAT32,
            *(
                compare(image, reference).psnr
                for image, reference in zip(images, pictures["float32"], strict=True)
            ),
        )
        for dtype, images in pictures.items()
    }
    report = {
        "least_psnr_db": {dtype: round(least, 3) for dtype, least in floor.items()},
        "made_on": {"chip": chip, "python": platform.python_version(), "torch": torch.__version__},
    }
    (folder / "floor.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
