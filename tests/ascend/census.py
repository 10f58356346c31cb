"""`python -m tests.ascend.census`: which kernels of an NPU one denoising step calls, and how often.

Counted on the real torch_npu over the stand-in CANN, in the environment of `make test-ascend`: the
difference between pictures of four and of two steps, halved. Toy networks have fewer blocks than the
real ones, and the same kernels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.ascend import standin


def main() -> None:
    library = standin.load()
    import torch

    torch.set_num_threads(1)
    import danqing
    from tests import deepgen_toys, toys

    columns: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        models = {
            "FLUX.1": toys.write_diffusers(folder / "flux"),
            "DeepGen-1.0": deepgen_toys.write(folder / "deepgen"),
        }
        for name, place in models.items():
            for fused in ("off", "all"):
                with danqing.open(place, device="npu:0", dtype="bfloat16", fused=fused) as engine:
                    run(engine, library, 2)  # what is done once for a size
                    counts = [run(engine, library, steps) for steps in (2, 4)]
                columns[f"{name}, fused {fused}"] = {
                    kernel: (counts[1].get(kernel, 0) - counts[0].get(kernel, 0)) / 2
                    for kernel in counts[1]
                }
    print("| kernel | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    kernels = sorted({kernel for column in columns.values() for kernel in column})
    for kernel in kernels:
        row = [column.get(kernel, 0) for column in columns.values()]
        if any(row):
            print(f"| {kernel} | " + " | ".join(f"{count:g}" for count in row) + " |")
    totals = " | ".join(f"**{sum(column.values()):g}**" for column in columns.values())
    print(f"| **calls a step** | {totals} |")


def run(engine: Any, library: Any, steps: int) -> dict[str, int]:
    before = standin.counts(library)
    engine.forget()
    engine.generate("a red boat", height=64, width=64, num_inference_steps=steps, seed=3)
    after = standin.counts(library)
    return {name: count - before.get(name, 0) for name, count in after.items()}


if __name__ == "__main__":
    main()
