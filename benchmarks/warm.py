"""The second picture of a prompt: a step streamed from disk against one whose weights stay.

    python benchmarks/real_size.py /var/tmp/flux24 --diffusers --blocks 2+4
    python benchmarks/warm.py /var/tmp/flux24 [--size 512] [--steps 4] [--turns 3]

Both engines are open at once and take turns; the first picture of each, which reads the text
encoders and touches memory for the first time, is not counted.
"""

from __future__ import annotations

import argparse
import statistics

from danqing.engine import Engine
from danqing.options import Options
from danqing.request import Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    request = Request(
        prompt="a boat", seed=1, height=options.size, width=options.size,
        num_inference_steps=options.steps,
    )  # fmt: skip
    seconds: dict[str, list[float]] = {"resident": [], "streamed": []}
    plain = Options(device="cpu", dtype="bfloat16")
    engines = {
        "resident": Engine.open(options.folder, plain),
        "streamed": Engine.open(options.folder, plain.replace(memory=4 << 30), planned_for=request),
    }
    assert all(engine.plan.placement == name for name, engine in engines.items())
    digests = set()
    for turn in range(options.turns + 1):
        for name, engine in engines.items():
            picture = engine.generate(request).pictures[0]
            digests.add(picture.pixels_sha256)
            denoise = next(cost for cost in picture.stages if cost.name == "denoise")
            if turn:
                seconds[name].append(denoise.seconds / options.steps)
    assert len(digests) == 1, "the pictures differ"
    print("| | least s a step | median | GiB |\n|---|---|---|---|")
    for name, values in seconds.items():
        peak = (engines[name].plan.predicted_peak_bytes or 0) / 2**30
        print(f"| {name} | {min(values):.2f} | {statistics.median(values):.2f} | {peak:.1f} |")
    print(f"\nstreamed / resident: {min(seconds['streamed']) / min(seconds['resident']):.3f}")


if __name__ == "__main__":
    main()
