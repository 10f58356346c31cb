"""A full-size model from a cold page cache to a PNG: danqing and diffusers, one process each.

    python benchmarks/real_size.py FOLDER --diffusers       # 34 GB, random weights
    python benchmarks/full_size.py FOLDER [--only NAME ...] [--size 512] [--times 1] [--json OUT]

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


def contenders(folder: Path, out: Path, size: int, steps: int) -> dict[str, list[str]]:
    danqing = [
        sys.executable, "-m", "danqing", "generate", PROMPT, "-m", str(folder), "--device", "cpu",
        "--dtype", "bfloat16", "--size", f"{size}x{size}", "--steps", str(steps), "--seed", "1",
        "--overwrite", "--quiet", "-o", str(out),
    ]  # fmt: skip
    script = [str(folder), str(out), str(size), str(steps), PROMPT]
    return {
        "danqing": danqing,
        "danqing --memory 4GiB": [*danqing, "--memory", "4GiB"],
        "danqing --quantise int8": [*danqing, "--quantise", "int8"],
        "diffusers": [sys.executable, "-c", DIFFUSERS, *script],
    }


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
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--only", action="append", help="a contender's name; may be repeated")
    parser.add_argument("--json", type=Path, help="where the numbers are added")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(options.times):
            rows = contenders(
                options.folder, Path(scratch) / "out.png", options.size, options.steps
            )
            for name, command in rows.items():
                if options.only and name not in options.only:
                    continue
                drop_from_cache(options.folder)
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
