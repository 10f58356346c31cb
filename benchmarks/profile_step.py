"""Where a step goes: matrix products, attention and the rest, and the rates of the first two.

    python benchmarks/real_size.py /var/tmp/flux24 --diffusers --blocks 2+4
    python benchmarks/profile_step.py /var/tmp/flux24 [--size 512] [--times 5]

Products and attention are timed where they are called; the rest is the difference. Beside it the
rate that the largest of these products reaches alone, again and again on the same numbers: what no
order of layers and no fusion can exceed; and the rate of the processor's registers, which no
product can exceed.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import step as one_step
import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from danqing.processor import compiled

if TYPE_CHECKING:
    from collections.abc import Callable


class Stopwatch(TorchFunctionMode):
    """Adds up seconds and operations of linear layers and of attention."""

    def __init__(self) -> None:
        """Begin at nothing."""
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, float] = defaultdict(float)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Time a call, if it is one of those."""
        kwargs = kwargs or {}
        if function is F.linear:
            name = "matrix products"
            operations = 2 * args[0].numel() * len(args[1])
        elif function is F.scaled_dot_product_attention:
            name = "attention"
            query, key = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
            operations = 4 * query.numel() * key.shape[-2]
        else:
            return function(*args, **kwargs)
        start = time.perf_counter()
        found = function(*args, **kwargs)
        self.seconds[name] += time.perf_counter() - start
        self.operations[name] += operations
        return found


def best_rate(tokens: int) -> float:
    """Return the operations a second of the largest product, warm."""
    states, weight = torch.randn(tokens, 3072).bfloat16(), torch.randn(12288, 3072).bfloat16()
    least = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        F.linear(states, weight)
        least = min(least, time.perf_counter() - start)
    return 2 * tokens * weight.numel() / least


def register_rates() -> dict[str, float]:
    """Return the operations a second that registers reach; empty where there is no such product."""
    library = compiled(Path(__file__).with_name("peak.cpp"))
    found: dict[str, float] = {}
    for kind in ("bf16", "int8") if library else ():
        run = getattr(library, f"danqing_peak_{kind}")
        run.restype, run.argtypes = ctypes.c_double, [ctypes.c_int64]
        run(1_000_000)
        start = time.perf_counter()
        operations = run(50_000_000)
        if operations:
            found[kind] = operations / (time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    makers: dict[str, Callable[[Path, int], Callable[[], Any]]] = {
        "diffusers": one_step.step_of_diffusers,
        "danqing": one_step.step_of_danqing,
    }
    print("| | step, s | matrix products | TFLOP/s | attention | TFLOP/s | the rest |")
    print("|---|---|---|---|---|---|---|")
    for name, make in makers.items():
        step = make(options.folder, options.size)
        with torch.inference_mode():
            step()
            best = None
            for _ in range(options.times):
                start = time.perf_counter()
                with Stopwatch() as watch:
                    step()
                total = time.perf_counter() - start
                if best is None or total < best[0]:
                    best = total, watch
        assert best
        total, watch = best
        cells = [f"{total:.2f}"]
        for part in ("matrix products", "attention"):
            if part not in watch.seconds:
                cells += ["by a kernel of ours, in the rest", ""]
                continue
            seconds = watch.seconds[part]
            rate = watch.operations[part] / seconds / 1e12
            cells += [f"{seconds:.2f} s ({100 * seconds / total:.0f} %)", f"{rate:.2f}"]
        cells.append(f"{total - sum(watch.seconds.values()):.2f} s")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    tokens = (options.size // 16) ** 2 + 256
    print(f"\nthe largest product alone: {best_rate(tokens) / 1e12:.2f} TFLOP/s")
    for kind, rate in register_rates().items():
        print(f"registers alone, {kind}: {rate / 1e12:.2f} T/s")


if __name__ == "__main__":
    main()
