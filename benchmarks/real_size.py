"""Write a model of real size with random weights: every name, shape and dtype of the release.

FLUX.1 as the files of the BFL release or as a diffusers folder (34 GB), DeepGen-1.0 as its folder
(14.3 GB). Pictures are noise, but the work is that of the real one: reading, memory, seconds a
step.

    python benchmarks/real_size.py FOLDER [--guided | --diffusers [--blocks 2+4] | --deepgen]
    danqing generate -m FOLDER "a cat" --size 256x256 --seed 1 --json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

POOL = 1 << 26  # random numbers to draw from, so that writing and not drawing takes the time
STD = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--guided", action="store_true", help="of the dev type")
    parser.add_argument("--diffusers", action="store_true", help="FLUX.1-schnell as its folder")
    parser.add_argument("--blocks", default="19+38", help="of the diffusers folder: double+single")
    parser.add_argument("--deepgen", action="store_true", help="DeepGen-1.0 instead of FLUX.1")
    options = parser.parse_args()
    from tests import deepgen_toys, sparse, toys

    if options.deepgen:
        deepgen_toys.write_real_size(options.folder)
    elif options.diffusers:
        double, single = map(int, options.blocks.split("+"))
        sparse.write_diffusers(options.folder, double=double, single=single)
    else:
        sparse.write_real_size(options.folder, guided=options.guided)
        toys.write_clip_tokenizer(options.folder / "clip")
        toys.write_t5_tokenizer(options.folder / "t5")
    values = torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * STD
    random = {"BF16": raw(values.bfloat16()), "F32": raw(values)}
    ones = {"BF16": raw(torch.ones(8192).bfloat16()), "F32": raw(torch.ones(8192))}
    for file in sorted(options.folder.rglob("*.safetensors")):
        fill(file, random, ones)
        print(f"{file}: {file.stat().st_size / 1e9:.1f} GB", flush=True)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.view(torch.uint8).numpy().data)


def fill(file: Path, random: dict[str, bytes], ones: dict[str, bytes]) -> None:
    """Overwrite a file's zeros: scales of norms with one, everything else with random numbers."""
    from danqing.weights.safetensors_file import SafetensorsFile

    places = np.random.default_rng(0)
    with file.open("r+b") as handle:
        for entry in SafetensorsFile(file).entries.values():
            handle.seek(entry.start)
            is_scale = entry.name.endswith("scale") or "norm" in entry.name
            if is_scale and len(entry.shape) == 1 and not entry.name.endswith("bias"):
                handle.write(ones[entry.dtype][: entry.size_bytes])
                continue
            left = entry.size_bytes
            while left:
                start = int(places.integers(0, len(random[entry.dtype]) // 128)) * 64
                left -= handle.write(random[entry.dtype][start : start + left])


if __name__ == "__main__":
    main()
