"""Plant faults and look for them; repeat honestly and look for false alarms. Prints tables.

    python benchmarks/faults.py

Faults: those of `tests/faults.py`, in the pocket model and in a toy DeepGen, in float32 and in
bfloat16. Honest repeats: the pocket suite's prompts with several seeds, one and two threads, with
and without oneDNN, another kernel of attention, compiled, in float32, bfloat16 and float16; each is
judged against the default.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import danqing
from danqing.pocket.suite import CASES
from danqing.verify.parity import check_parity
from tests import deepgen_toys, faults

if TYPE_CHECKING:
    from collections.abc import Callable

    from danqing.verify.parity import Parity

PROMPT = "three blue mountains under a red sun, a boat on the water"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=270, help="honest ones; 0 for none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        toy = deepgen_toys.write(Path(home) / "toy")
        for dtype in ("float32", "bfloat16"):
            plant_all(str(toy), dtype)
    if options.repeats:
        repeat(options.repeats)


def plant_all(toy: str, dtype: str) -> None:
    print(f"\n## Planted faults, {dtype}\n\n| fault | first joint | error / limit | named | |")
    print("|---|---|---|---|---|")
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    edit = {"height": 64, "width": 64, "num_inference_steps": 3,
            "image": Image.fromarray(small).resize((96, 64))}  # fmt: skip
    caught = named = total = 0
    for place, rows, settings in (("pocket", faults.POCKET, {}), (toy, faults.DEEPGEN, edit)):
        for fault in rows:
            found = judge(place, dtype, with_fault(place, dtype, fault), PROMPT, 3, **settings)
            bad = found.first_failure
            total += 1
            if bad is None:
                print(f"| {fault.what} | | | | not seen: {found.rung} |")
                continue
            right = faults.is_named(fault, found.culprit, bad.stage)
            caught, named = caught + 1, named + right
            ratio = f"{bad.port:.1e} / {bad.limit:.1e}"
            mark = "right" if right else f"wanted {fault.wanted}"
            print(
                f"| {fault.what} | {bad.name} | {ratio} | {found.culprit or bad.stage} | {mark} |"
            )
    print(f"\n{caught} of {total} caught, {named} named.", flush=True)


def with_fault(place: str, dtype: str, fault: faults.Fault) -> Callable[[], danqing.Engine]:
    return lambda: faults.plant(danqing.open(place, device="cpu", dtype=dtype), fault)


def judge(
    place: str, dtype: str, candidate: Callable[[], danqing.Engine], prompt: str, seed: int,
    **settings: Any,
) -> Parity:  # fmt: skip
    with danqing.open(place, device="cpu") as engine:
        request = engine.spec.resolve(danqing.Request(prompt=prompt, seed=seed, **settings))
    with tempfile.TemporaryDirectory() as folder:
        return check_parity(
            exact=lambda: danqing.open(place, device="cpu", dtype="float32"),
            reference=lambda: danqing.open(place, device="cpu", dtype=dtype),
            candidate=candidate,
            request=request,
            folder=Path(folder),
        )


def repeat(count: int) -> None:
    print("\n## Honest repeats\n")
    print("| dtype | what is other | runs | false alarms | largest error / limit |")
    print("|---|---|---|---|---|")
    variants: dict[str, dict[str, Any]] = {
        "1 thread": {},
        "2 threads": {"threads": 2},
        "1 thread, no oneDNN": {"one_dnn": False},
        "2 threads, no oneDNN": {"threads": 2, "one_dnn": False},
        "attention of matrix products": {"attention": "math"},
        "compiled (judged as a switch)": {"compile_with": "inductor"},
    }
    dtypes = ("float32", "bfloat16", "float16")
    each = -(-count // (len(variants) * len(dtypes)))
    total = false = 0
    for dtype in dtypes:
        for what, change in variants.items():
            candidate = elsewhere(dtype, **change)
            alarms, largest = 0, 0.0
            runs = each if "compile_with" not in change else min(each, 2)
            for number in range(runs):
                torch.set_num_threads(1)
                torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
                case = CASES[number % len(CASES)]
                found = judge("pocket", dtype, candidate, case.prompt, number)
                alarms += found.first_failure is not None
                largest = max(largest, *(one.port / one.limit for one in found.joints))
            total, false = total + runs, false + alarms
            print(f"| {dtype} | {what} | {runs} | {alarms} | {largest:.2f} |", flush=True)
    print(f"\n{false} false alarms in {total} honest repeats.", flush=True)


def elsewhere(
    dtype: str, *, threads: int = 1, one_dnn: bool = True, **options: Any
) -> Callable[[], danqing.Engine]:
    """Open the pocket model with other kernels, or another number of threads."""

    def opened() -> danqing.Engine:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.enabled = one_dnn  # type: ignore[assignment]
        return danqing.open("pocket", device="cpu", dtype=dtype, **options)

    return opened


if __name__ == "__main__":
    main()
