"""Compare every tensor of two checkouts of danqing, bit for bit: a refactoring must change none.

    git worktree add /tmp/before COMMIT
    python benchmarks/same_bits.py /tmp/before

Runs the pocket model and toys of FLUX.1 (schnell, dev) and DeepGen-1.0 (text to image, edit), in
float32 and bfloat16, resident and streamed, and in int8, once with each checkout's sources. All
tensors at the joints of a run are compared: conditioning, noise, each step's velocity and latents,
pixels. Exits with 1 if one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DTYPES = ("float32", "bfloat16")
WAYS: tuple[dict[str, str], ...] = (
    {"placement": "resident"}, {"placement": "streamed"},
    {"quantise": "int8"},
)  # fmt: skip
SMALL = {"height": 64, "width": 64, "num_inference_steps": 3, "seed": 7}


def write_toys(folder: Path) -> None:
    """Write the toy checkpoints, and an image to edit."""
    sys.path.insert(0, str(ROOT))
    from PIL import Image

    from tests import deepgen_toys, toys

    toys.write_diffusers(folder / "schnell")
    toys.write_diffusers(folder / "dev", guided=True, seed=1)
    deepgen_toys.write(folder / "deepgen")
    Image.radial_gradient("L").convert("RGB").resize((96, 64)).save(folder / "edit.png")


def cases(folder: Path) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name each case: model, options of the engine, settings of the request."""
    image = str(folder / "edit.png")
    requests: dict[str, tuple[str, dict[str, Any]]] = {
        "pocket": ("pocket", {"prompt": "two blue mountains under a red sun"}),
        "schnell": (str(folder / "schnell"), {"prompt": "a cat"}),
        "dev": (str(folder / "dev"), {"prompt": "a cat", "guidance_scale": 3.0}),
        "deepgen": (str(folder / "deepgen"), {"prompt": "a cat"}),
        "deepgen edit": (str(folder / "deepgen"), {"prompt": "make it red", "image": image}),
    }
    return {
        " ".join([name, dtype, *way.values()]): (model, {"dtype": dtype, **way}, settings)
        for name, (model, settings) in requests.items()
        for dtype in DTYPES
        for way in WAYS
    }


def run(folder: Path) -> None:
    """Print the digest of each tensor of each case as JSON; an error stands for its case."""
    import torch

    import danqing
    from danqing.request import Request

    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    for case, (model, options, settings) in cases(folder).items():
        joints: dict[str, str] = {}

        def probe(name: str, array: Any, joints: dict[str, str] = joints) -> None:
            joints[name] = hashlib.sha256(array.bits.tobytes()).hexdigest()

        try:
            with danqing.open(model, device="cpu", **options) as engine:
                engine.probe(Request(**SMALL, **settings), probe)
        except danqing.DanqingError as error:
            joints["error"] = error.what
        found[case] = joints
    print(json.dumps(found))


def digests(checkout: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Run all cases with the sources of a checkout."""
    done = subprocess.run(
        [sys.executable, __file__, "--run", str(folder), str(checkout)],
        env={**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout to compare this one with")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        run(options.run)
        return
    with tempfile.TemporaryDirectory() as home:
        write_toys(Path(home))
        before = digests(options.before.resolve(), Path(home))
        after = digests(ROOT, Path(home))
    differ = 0
    for case, old in before.items():
        new = after.get(case, {})
        first = next((name for name in old if old[name] != new.get(name)), None)
        same = first is None and old.keys() == new.keys()
        differ += not same
        text = (
            f"identical, {len(old)} tensors" if same else f"DIFFERS from {first or 'more joints'}"
        )
        print(f"{case:44} {text}" + (f" ({old['error']})" if "error" in old else ""))
    print(f"{len(before) - differ} of {len(before)} cases identical")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
