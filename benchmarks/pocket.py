"""How long the first command of the README takes, and how fast the pocket model paints.

python benchmarks/pocket.py [--repeats 5] [--pictures 64]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

PROMPT = "three blue mountains under a red sun, a boat on the water"
PAINT = "import sys; from danqing.cli import main; sys.argv = {arguments!r}; main()"
IMPORTS = """
import gc; gc.disable()
import danqing.cli.generate, danqing.engine, danqing.devices
danqing.devices.import_torch(); danqing.devices.select("cpu")
import danqing.models.flux.model
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
gc.freeze()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=64)
    given = parser.parse_args()
    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        words = ["danqing", "generate", PROMPT, "-q", "-o", f"{folder}/a.png", "--seed", "1"]
        paint = PAINT.format(arguments=words)
        rows["process to file, s"] = _median([paint], given.repeats)
    rows["of it importing, s"] = _median([IMPORTS], given.repeats)
    rows |= {f"pictures/s at batch {batch}": _rate(batch, given.pictures) for batch in (1, 4, 16)}
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.2f} |")
    print(json.dumps({name: round(value, 3) for name, value in rows.items()}))


def _median(code: list[str], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", *code], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def _rate(batch: int, pictures: int) -> float:
    import danqing

    with danqing.open("pocket", device="cpu") as engine:
        engine.generate(PROMPT, seed=0, num_images_per_prompt=batch, batch=batch)  # warm
        started = time.monotonic()
        engine.generate(PROMPT, seed=0, num_images_per_prompt=pictures, batch=batch)
        return pictures / (time.monotonic() - started)


if __name__ == "__main__":
    main()
