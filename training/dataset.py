"""The training set: scene number i is always the same scene, painted the same way.

Pictures are painted once, in chunks, into a folder; sentences are written anew each time they are
read, so that no two passes see the same words.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from training.painter import paint
from training.scenes import draw_geometry, draw_landscape

if TYPE_CHECKING:
    from pathlib import Path

    from training.scenes import Scene

CHUNK = 2000
GEOMETRY_SHARE = 0.45


def scene(seed: int, index: int) -> tuple[Scene, np.random.Generator]:
    """Return scene number `index` and the generator that paints it."""
    random = np.random.default_rng([seed, index])
    if random.random() < GEOMETRY_SHARE:
        return draw_geometry(random), random
    return draw_landscape(random), random


def is_geometry(seed: int, index: int) -> bool:
    """Say whether scene number `index` is a geometric one, without drawing it."""
    return bool(np.random.default_rng([seed, index]).random() < GEOMETRY_SHARE)


def render(folder: Path, *, seed: int, count: int, processes: int) -> None:
    """Paint the first `count` scenes; chunks that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = range((count + CHUNK - 1) // CHUNK)
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(partial(_render_chunk, folder, seed), chunks))


def _render_chunk(folder: Path, seed: int, chunk: int) -> None:
    target = folder / f"pictures-{chunk:04d}.npy"
    if target.exists():
        return
    pictures = np.stack(
        [paint(*scene(seed, index)) for index in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
    )
    unfinished = target.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.save(file, pictures)
    unfinished.rename(target)


def pictures(folder: Path, chunk: int) -> np.ndarray:
    """Return one chunk, (2000, 128, 128, 3) bytes."""
    found: np.ndarray = np.load(folder / f"pictures-{chunk:04d}.npy", mmap_mode="r")
    return found
