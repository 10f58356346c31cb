"""What danqing costs on top of the arithmetic: against diffusers' own FluxPipeline.

The same toy weights, steps, size and noise, in one process, the two alternating; medians and their
ratio. At toy size the arithmetic is small, so the ratio shows the overhead at its worst.

    python benchmarks/overhead.py [--pictures 40] [--size 256] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "a photo of a blue pizza"
STEPS, TOKENS = 4, 256
COLD = {
    "danqing": (
        "import sys; from danqing.cli import main\n"
        "sys.argv = ['danqing', 'generate', {prompt!r}, '-m', {folder!r}, '-q', '--overwrite',"
        " '--size', '{size}x{size}', '-o', {target!r}]\nmain()"
    ),
    "diffusers": (
        "import torch; from diffusers import FluxPipeline\n"
        "pipe = FluxPipeline.from_pretrained({folder!r}, torch_dtype=torch.float32,"
        " local_files_only=True)\n"
        "pipe({prompt!r}, num_inference_steps=4, max_sequence_length=256, height={size},"
        " width={size}).images[0].save({target!r})"
    ),
}


def load_diffusers(folder: Path) -> Any:
    import torch
    from diffusers import FluxPipeline

    with contextlib.redirect_stderr(io.StringIO()):
        pipe = FluxPipeline.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_danqing(folder: Path) -> Any:
    import danqing

    engine = danqing.open(folder, device="cpu")
    engine.load()
    return engine


def paint_diffusers(pipe: Any, size: int) -> Any:
    import torch

    return pipe(
        PROMPT,
        num_inference_steps=STEPS,
        max_sequence_length=TOKENS,
        height=size,
        width=size,
        generator=torch.Generator("cpu").manual_seed(1),
    ).images[0]


def paint_danqing(engine: Any, size: int) -> Any:
    return engine.generate(PROMPT, seed=1, height=size, width=size).image


def alternate(pair: dict[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Run the two in turn; return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    for turn in range(times):
        for name in list(pair) if turn % 2 else reversed(list(pair)):
            start = time.perf_counter()
            pair[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def cold(name: str, folder: Path, size: int) -> None:
    code = COLD[name].format(
        prompt=PROMPT, folder=str(folder), size=size, target=str(folder / "cold.png")
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    from tests import toys

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        folder = toys.write_diffusers(Path(scratch))
        size = options.size
        engine, pipe = load_danqing(folder), load_diffusers(folder)
        for _ in range(2):  # the first pictures are slower on both sides
            paint_danqing(engine, size)
            paint_diffusers(pipe, size)
        ours, theirs = paint_danqing(engine, size), paint_diffusers(pipe, size)
        rows = {
            "a picture, loaded": alternate(
                {
                    "danqing": lambda: paint_danqing(engine, size),
                    "diffusers": lambda: paint_diffusers(pipe, size),
                },
                options.pictures,
            ),
            "loading, imported": alternate(
                {
                    "danqing": lambda: load_danqing(folder),
                    "diffusers": lambda: load_diffusers(folder),
                },
                10,
            ),
            "process to file": alternate(
                {
                    "danqing": lambda: cold("danqing", folder, size),
                    "diffusers": lambda: cold("diffusers", folder, size),
                },
                5,
            ),
        }
    report(rows, ours, theirs, options)


def report(rows: dict[str, dict[str, float]], ours: Any, theirs: Any, options: Any) -> None:
    import diffusers
    import numpy as np
    import torch

    from danqing.processor import cpu_model

    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max()
    if options.json:
        print(json.dumps({"rows": rows, "largest_pixel_difference": int(difference)}))
        return
    machine = f"{cpu_model()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{machine}, {versions}, {options.size} pixels square")
    print(f"largest pixel difference between the two: {difference}\n")
    print("| | danqing | diffusers | ratio |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        ratio = row["danqing"] / row["diffusers"]
        print(f"| {name} | {row['danqing']:.3f} s | {row['diffusers']:.3f} s | {ratio:.2f} |")


if __name__ == "__main__":
    main()
