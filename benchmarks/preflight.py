"""How long it takes, and how much memory, to check a FLUX.1 of real size before it is read.

The files are sparse: true headers of 34 GB, over zeros that take no disk.

    python benchmarks/preflight.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

CODE = """
import json, time
def status(row):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(row))
def memory():
    return status("VmRSS:")
def peak():
    return status("VmHWM:")
rows = {{}}
def note(name, started):
    rows[name] = [time.perf_counter() - started, memory(), peak()]
started = time.perf_counter()
from danqing import models, weights
checkpoint = models.open_checkpoint({place!r})
spec = models.identify(checkpoint)
for name in checkpoint.components:
    checkpoint.components[name].entries
note("found, headers read, identified; without torch", started)
started = time.perf_counter()
import danqing.devices
danqing.devices.import_torch()
import danqing.models.preflight, danqing.models.flux.model
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel
note("importing torch, diffusers, transformers", started)
started = time.perf_counter()
found = danqing.models.preflight.preflight(checkpoint)
note("every tensor's name and shape compared", started)
assert found.sound, [str(part.fault) for part in found.findings]
print(json.dumps(rows))
"""


def main() -> None:
    from tests import sparse, toys

    with tempfile.TemporaryDirectory() as name:
        folder = sparse.write_real_size(Path(name) / "flux", guided=True)
        toys.write_clip_tokenizer(folder / "clip")
        toys.write_t5_tokenizer(folder / "t5")
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        print(f"{size / 1e9:.1f} GB in {folder}")
        command = [sys.executable, "-c", CODE.format(place=str(folder))]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            sys.exit(child.stderr)
        print(f"{'':50}{'seconds':>9}{'MB then':>9}{'MB at most':>12}")
        for step, (seconds, now, most) in json.loads(child.stdout).items():
            print(f"{step:50}{seconds:9.2f}{now / 1e6:9.0f}{most / 1e6:12.0f}")


if __name__ == "__main__":
    main()
