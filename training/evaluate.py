"""How well the finished model does what it is told: the figures of the model card.

Everything goes through danqing itself, as a user would paint. The prompts are of combinations that
were never in the training set.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import danqing
from danqing.pocket.judge import Wanted, judge, view
from training.captions import write
from training.painter import paint
from training.scenes import Geometry, Landscape, draw_geometry, draw_landscape

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SEED = 20_000_003


def held_out(count: int) -> Iterator[tuple[str, Wanted]]:
    """Yield prompts of geometric scenes that were kept from training, with what they say."""
    for index in range(count):
        random = np.random.default_rng([SEED, index])
        scene = draw_geometry(random, held_out=True)
        yield write(scene, random), wanted(scene)


def wanted(scene: Geometry) -> Wanted:
    """Return what a picture of the scene must show."""
    return Wanted(
        things=tuple((thing.shape, thing.colour) for thing in scene.things),
        word=scene.word,
        ground=scene.ground,
    )


def landscapes(count: int) -> Iterator[tuple[str, Landscape]]:
    """Yield prompts of landscapes that were not in the training set."""
    for index in range(count):
        random = np.random.default_rng([SEED + 1, index])
        scene = draw_landscape(random)
        yield write(scene, random), scene


def told(scene: Landscape, seen: Any) -> dict[str, bool | None]:
    """Say which attributes a landscape shows as told; None for what the sentence leaves open."""
    return {
        "time": seen.time == scene.time if "time" in scene.told else None,
        "light": bool(seen.body_colour) == bool(scene.body),
        "light's colour": (
            seen.body_colour == scene.body_colour if "body_colour" in scene.told else None
        ),
        "mountains": seen.mountains == scene.mountains if "mountains" in scene.told else None,
        "boat": bool(seen.boats) == bool(scene.boats),
        "boats": seen.boats == scene.boats,
    }


def detector(count: int) -> dict[str, Any]:
    """Measure the judge itself on the painter's own pictures."""
    rows: dict[str, list[bool]] = {}
    for index in range(count):
        random = np.random.default_rng([SEED + 2, index])
        scene: Any = draw_geometry(random) if index % 2 else draw_landscape(random)
        image = Image.fromarray(paint(scene, random))
        if isinstance(scene, Geometry):
            _note(rows, vars(judge(image, wanted(scene))))
        else:
            _note(rows, told(scene, view(image)))
    return _shares(rows)


def adherence(engine: danqing.Engine, *, shapes: int, scenes: int) -> dict[str, Any]:
    """Paint the prompts, picture k with seed k, and judge the pictures."""
    rows: dict[str, list[bool]] = {}
    failures = []
    for seed, (prompt, scene) in enumerate(held_out(shapes)):
        verdict = judge(engine.generate(prompt, seed=seed).image, scene)
        _note(rows, vars(verdict))
        if not (verdict.colour and verdict.shape and verdict.relation is not False):
            failures.append({"prompt": prompt, "seed": seed, **vars(verdict)})
    for seed, (prompt, landscape) in enumerate(landscapes(scenes)):
        found = told(landscape, view(engine.generate(prompt, seed=seed).image))
        _note(rows, found)
        if False in found.values():
            failures.append({"prompt": prompt, "seed": seed, **found})
    return {"right": _shares(rows), "failures": failures}


def diversity(engine: danqing.Engine, prompt: str, *, count: int) -> float:
    """Return the mean absolute pixel distance between pictures of one prompt, in 8-bit levels."""
    images = [
        np.asarray(engine.generate(prompt, seed=seed).image, np.float32) for seed in range(count)
    ]
    pairs = [
        np.abs(first - second).mean()
        for place, first in enumerate(images)
        for second in images[place + 1 :]
    ]
    return float(np.mean(pairs))


def _note(rows: dict[str, list[bool]], found: dict[str, bool | None]) -> None:
    for name, right in found.items():
        if right is not None:
            rows.setdefault(name, []).append(right)


def _shares(rows: dict[str, list[bool]]) -> dict[str, Any]:
    return {
        name: {
            "right": sum(found),
            "of": len(found),
            "percent": round(100 * sum(found) / len(found), 2),
        }
        for name, found in rows.items()
    }


def sheet(images: list[Image.Image], columns: int, place: Path) -> None:
    """Write pictures side by side, with a narrow white border between them."""
    width, height = images[0].size
    rows = (len(images) + columns - 1) // columns
    whole = Image.new("RGB", (columns * (width + 4) + 4, rows * (height + 4) + 4), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        whole.paste(image, (4 + column * (width + 4), 4 + row * (height + 4)))
    whole.save(place, optimize=True)


def report(folder: Path, *, shapes: int = 600, scenes: int = 300) -> dict[str, Any]:
    """Measure everything and write `figures.json` and the sheet of 64 landscapes to `folder`."""
    with danqing.open("pocket") as engine:
        found = {
            "judge on painted pictures": detector(2000),
            "adherence": adherence(engine, shapes=shapes, scenes=scenes),
            "diversity": {
                prompt: round(diversity(engine, prompt, count=12), 2)
                for prompt in (
                    "three blue mountains under a red sun, a boat on the water",
                    "a landscape at night",
                    "a red circle above a blue square on a white ground",
                )
            },
        }
        images = [
            engine.generate(prompt, seed=seed).image
            for seed, (prompt, _) in enumerate(landscapes(64))
        ]
    sheet(images, 8, folder / "sheet.png")
    (folder / "figures.json").write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    return found
