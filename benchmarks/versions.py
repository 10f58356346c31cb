"""Paint the same toy checkpoints under two sets of library versions, and compare the pictures.

    python benchmarks/versions.py .venv/bin/python .venv-oldest/bin/python

Both interpreters have danqing; the toys are written once, by the first. Pixels are compared as they
leave the autoencoder, in float32, before they are rounded: 0 to 1, so that 1e-5 is a hundredth of a
level of 8 bits. `--limit` makes it fail beyond.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
WRITE = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests import deepgen_toys, toys
home = Path({home!r})
toys.write_diffusers(home / "flux-schnell")
toys.write_diffusers(home / "flux-dev", guided=True, seed=1)
deepgen_toys.write(home / "deepgen")
"""
PAINT = """
import json
from importlib.metadata import version
from pathlib import Path
import numpy as np
from PIL import Image
import danqing, danqing.engine
danqing.devices.import_torch().set_num_threads(1)
home, kept = Path({home!r}), []
to_image = danqing.engine.stages.to_image
danqing.engine.stages.to_image = lambda pixels: (kept.append(pixels), to_image(pixels))[1]
small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
image = Image.fromarray(small).resize((96, 64))
for name, settings in {cases!r}.items():
    if settings.pop("edit", False):
        settings["image"] = image
    with danqing.open(home / settings.pop("model"), device="cpu", dtype="float32") as engine:
        engine.generate("a small red boat", seed=5, height=64, width=96, **settings)
    np.save(home / (name + {end!r}), kept[-1].float().cpu().numpy() / 2 + 0.5)
print(json.dumps({{n: version(n) for n in ("torch", "diffusers", "transformers")}}))
"""
CASES = {
    "FLUX.1-schnell, 4 steps": {"model": "flux-schnell"},
    "FLUX.1-dev, 20 steps": {"model": "flux-dev", "num_inference_steps": 20},
    "DeepGen-1.0, words, 4 steps": {"model": "deepgen", "num_inference_steps": 4},
    "DeepGen-1.0, an edit, 4 steps": {"model": "deepgen", "num_inference_steps": 4, "edit": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", help="a Python interpreter")
    parser.add_argument("second", help="another")
    parser.add_argument("--limit", type=float, default=1e-5, help="largest difference allowed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        run(options.first, WRITE.format(root=str(ROOT), home=home))
        for number, python in enumerate((options.first, options.second)):
            text = run(python, PAINT.format(home=home, cases=CASES, end=f"-{number}.npy"))
            versions = json.loads(text.splitlines()[-1])
            print(", ".join(f"{name} {version}" for name, version in versions.items()))
        print("\n| | largest difference | mean difference |\n|---|---|---|")
        worst = 0.0
        for name in CASES:
            first, second = (np.load(Path(home) / f"{name}-{number}.npy") for number in (0, 1))
            difference = np.abs(first - second)
            worst = max(worst, float(difference.max()))
            print(f"| {name} | {difference.max():.1e} | {difference.mean():.1e} |")
    if worst > options.limit:
        sys.exit(f"{worst:.1e} is more than {options.limit:.0e}")


def run(python: str, code: str) -> str:
    child = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if child.returncode:
        sys.exit(child.stderr)
    return child.stdout


if __name__ == "__main__":
    main()
