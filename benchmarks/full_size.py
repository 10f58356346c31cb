"""A full-size model from a cold page cache to a PNG: danqing and diffusers, one process each.

    python benchmarks/real_size.py FOLDER --diffusers       # 34 GB, random weights
    danqing convert FOLDER FOLDER-int8 --layout diffusers --dtype int8          # 17 GB
    python benchmarks/full_size.py FOLDER [--int8 FOLDER-int8] [--only NAME ...] [--times 1]

    python benchmarks/real_size.py FOLDER --deepgen         # 14 GB
    python benchmarks/full_size.py FOLDER --deepgen [--steps 50]

Each contender is a process of its own, one after the other; before each the files' pages are
dropped from the page cache. Seconds are from start to exit of the process, the peak is its VmHWM:
pages of mapped files counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "three blue mountains under a red sun, a boat on the water"

DIFFUSERS = """
import sys, torch
from diffusers import FluxPipeline
folder, out, size, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True)
pipe(sys.argv[5], height=size, width=size, num_inference_steps=steps, guidance_scale=0.0,
     max_sequence_length=256, generator=torch.Generator("cpu").manual_seed(1)).images[0].save(out)
"""
STOCK_PARTS = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[6])
import numpy as np
from PIL import Image
from danqing.models import identify, open_model
from danqing.models import open_checkpoint
from tests import deepgen_reference as stock
folder, out, size, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
checkpoint = open_checkpoint(folder)
config = open_model(checkpoint, identify(checkpoint)).config_of("connector")
parts = stock.load(folder, torch.bfloat16, config)
noise = torch.randn(1, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(1))
pixels = stock.paint(parts, sys.argv[5], "", noise.bfloat16(), steps=steps, guidance=4.0)
values = (pixels[0].float().clamp(-1, 1) + 1) * 127.5
Image.fromarray(values.permute(1, 2, 0).round().numpy().astype(np.uint8)).save(out)
"""


def contenders_deepgen(folder: Path, out: Path, size: int, steps: int) -> dict[str, list[str]]:
    danqing = [
        sys.executable, "-m", "danqing", "generate", PROMPT, "-m", str(folder), "--device", "cpu",
        "--dtype", "bfloat16", "--size", f"{size}x{size}", "--steps", str(steps), "--seed", "1",
        "--guidance_scale", "4", "--overwrite", "--quiet", "-o", str(out),
    ]  # fmt: skip
    root = str(Path(__file__).parents[1])
    script = [str(folder), str(out), str(size), str(steps), PROMPT, root]
    return {
        "danqing": danqing,
        "danqing --memory 6GiB": [*danqing, "--memory", "6GiB"],
        "stock parts": [sys.executable, "-c", STOCK_PARTS, *script],
    }


def contenders(
    folder: Path, out: Path, size: int, steps: int, converted: Path | None
) -> dict[str, list[str]]:
    def danqing(place: Path, *more: str) -> list[str]:
        return [
            sys.executable, "-m", "danqing", "generate", PROMPT, "-m", str(place), "--device",
            "cpu", "--dtype", "bfloat16", "--size", f"{size}x{size}", "--steps", str(steps),
            "--seed", "1", "--overwrite", "--quiet", "-o", str(out), *more,
        ]  # fmt: skip

    int8, small = ("--quantise", "int8"), ("--memory", "4GiB")
    found = {
        "danqing": danqing(folder),
        "danqing --memory 4GiB": danqing(folder, *small),
        "danqing --quantise int8": danqing(folder, *int8),
        "danqing --quantise int8 --memory 4GiB": danqing(folder, *int8, *small),
    }
    if converted is not None:
        found |= {
            "converted to int8: danqing": danqing(converted),
            "converted to int8: danqing --memory 4GiB": danqing(converted, *small),
            "converted to int8: danqing --quantise int8": danqing(converted, *int8),
            "converted to int8: danqing --quantise int8 --memory 4GiB": danqing(
                converted, *int8, *small
            ),
        }
    script = [str(folder), str(out), str(size), str(steps), PROMPT]
    return {**found, "diffusers": [sys.executable, "-c", DIFFUSERS, *script]}


def drop_from_cache(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def run(command: list[str]) -> tuple[float, float]:
    """Return seconds and peak GiB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peak = max(peak, int(line.split()[1]))
        except OSError:
            break
        time.sleep(0.2)
    error = process.stderr.read().decode() if process.stderr else ""
    if process.wait():
        sys.exit(f"{command[:6]}: {error[-2000:]}")
    return time.perf_counter() - start, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--int8", type=Path, help="the same, converted to int8")
    parser.add_argument("--deepgen", action="store_true", help="the folder is a DeepGen-1.0")
    parser.add_argument("--steps", type=int, help="4; of DeepGen-1.0 50")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--only", action="append", help="a contender's name; may be repeated")
    parser.add_argument("--json", type=Path, help="where the numbers are added")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(options.times):
            steps = options.steps or (50 if options.deepgen else 4)
            given = (options.folder, Path(scratch) / "out.png", options.size, steps)
            rows = (
                contenders_deepgen(*given) if options.deepgen else contenders(*given, options.int8)
            )
            for name, command in rows.items():
                if options.only and name not in options.only:
                    continue
                for folder in filter(None, (options.folder, options.int8)):
                    drop_from_cache(folder)
                found.setdefault(name, []).append(run(command))
                seconds, peak = found[name][-1]
                print(
                    f"{turn} {name}: {seconds:.0f} s, {peak:.1f} GiB", file=sys.stderr, flush=True
                )
    print("| | seconds | peak GiB |\n|---|---|---|")
    for name, runs in found.items():
        seconds = statistics.median(one for one, _ in runs)
        print(f"| {name} | {seconds:.0f} | {max(peak for _, peak in runs):.1f} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
