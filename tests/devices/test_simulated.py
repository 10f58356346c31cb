"""The simulated NPU: every device's contract, pictures equal to the CPU's, what a chip refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from danqing.devices.ascend_chips import CHIPS, chip_named
from tests.conftest import call_danqing, run_danqing
from tests.marks import slow_among

ROOT = Path(__file__).parents[2]
ROWS = ("cpu", "910B3", "910A", "310P3")


def run_python(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=170,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def contracts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what was found is kept: for all processes of this test run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def contract(row: str, kept: Path) -> Any:
    import fcntl

    place = kept / f"contract-{row}.json"
    with (kept / f"contract-{row}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other process may be at it
        if not place.is_file():
            place.write_text(run_python("-m", "tests.devices.contract", row).stdout)
    return json.loads(place.read_text())


@pytest.mark.parametrize("row", slow_among(ROWS, ROWS[2:]))
def test_contract(row: str, contracts: Path) -> None:
    found = contract(row, contracts)
    free, total = found["memory"]
    assert 0 < free <= total
    assert found["grown"] >= 0.9 * 4 * 8 * 2**20
    assert found["out_of_memory"] is True
    assert found["other_error"] is False
    assert found["deterministic"] == [True, False]
    assert found["reason"] == "asked for"
    assert found["noise"] == contract("cpu", contracts)["noise"]
    assert found["dtypes"]["float32"] == "native"
    if row == "cpu":
        return
    chip = chip_named(row)
    assert chip is not None
    assert found["chip"] == f"Ascend{row} (simulated)"
    assert found["name"] == "npu:0"
    assert total == (chip.memory_gib - 3) * 2**30
    assert found["dtypes"]["bfloat16"] == ("native" if chip.bfloat16 else "no")
    assert set(found["peaks"].values()) == {None}  # the CPU's speed is no share of it


@pytest.mark.parametrize("row", slow_among(ROWS[1:], ROWS[2:]))
def test_pictures_have_the_cpus_bits(row: str, contracts: Path) -> None:
    """FLUX.1 and DeepGen-1.0, words and edits, resident and staged, every dtype of the chip."""
    found = contract(row, contracts)["pictures"]
    chip = chip_named(row)
    assert chip is not None
    assert len(found) == (36 if chip.bfloat16 else 28)
    for name, outcome in found.items():
        if "bfloat16" in name and not chip.bfloat16:
            assert "does not compute in bfloat16" in outcome
        else:
            assert outcome is True, name


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_chips_are_found_by_their_names(chip: Any) -> None:
    for name in (chip.name, f"Ascend{chip.name}", f"Ascend {chip.name}", chip.name.lower()):
        assert chip_named(name) == chip
    assert chip_named("Ascend9999") is None


# --- rehearse ------------------------------------------------------------------------------------


def rehearse(*words: object, options: tuple[object, ...] = ()) -> tuple[int, Any, str]:
    done = run_danqing("rehearse", "--json", *options, "--", *words)
    told = done.stdout[done.stdout.index('{\n "') :]
    return done.returncode, json.loads(told), done.stderr


MISTAKES = {
    "float64 positions": (
        """
        import torch
        ids = torch.arange(16, device="npu")
        freqs = torch.outer(ids.to(torch.float32), torch.ones(4, dtype=torch.float32, device="npu"))
        table = torch.ones(4, dtype=torch.float64, device="npu").repeat_interleave(2)  #!refused
        """,
        "DT_DOUBLE",
    ),
    "double on the device": (
        """
        import torch
        x = torch.ones(3, device="npu")
        y = x.double()  #!double
        assert y.dtype is torch.float32
        """,
        "float64 on the device silently becomes float32",
    ),
    "complex index": (
        """
        import torch
        turns = torch.view_as_complex(torch.ones(4, 2, device="npu"))
        places = torch.tensor([0, 2], device="npu")
        taken = turns[places]  #!refused
        """,
        "DT_COMPLEX64",
    ),
    "a generator of CUDA": (
        """
        import torch
        generator = torch.Generator("cuda").manual_seed(0)  #!cuda
        """,
        "CUDA",
    ),
    "a generator of the CPU on the device": (
        """
        import torch
        noise = torch.randn(3, device="npu", generator=torch.Generator().manual_seed(0))  #!failed
        """,
        "generator",
    ),
    "bfloat16 on a 910A": (
        """
        import torch
        x = torch.ones(4, 4, dtype=torch.bfloat16).to("npu")
        y = x @ x  #!refused
        """,
        "DT_BFLOAT16",
    ),
    "flash_attn": (
        """
        import torch
        from flash_attn import flash_attn_func  #!missing
        """,
        "flash_attn is for CUDA",
    ),
    "cuda by name": (
        """
        import torch
        model = torch.nn.Linear(3, 3)
        model = model.cuda()  #!cuda
        """,
        "",  # a build without CUDA says so, one with it misses the driver
    ),
    "two devices": (
        """
        import torch
        x = torch.ones(3, device="npu") + torch.ones(3)  #!failed
        """,
        "same device",
    ),
    "too much memory": (
        """
        import torch
        x = torch.ones(20, 2**30, device="npu", dtype=torch.float32)  #!memory
        """,
        "out of memory",
    ),
    "on the host": (
        """
        import torch
        x = torch.ones(4, 4, device="npu")
        y = torch.special.bessel_j0(x)  #!host
        """,
        "runs on the host's CPU",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_each_mistake_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    import textwrap

    text, wanted = MISTAKES[name]
    script = tmp_path / "port.py"
    script.write_text(textwrap.dedent(text).lstrip(), "utf-8")
    lines = script.read_text("utf-8").splitlines()
    number, kind = next(
        (place, line.split("#!")[1]) for place, line in enumerate(lines, 1) if "#!" in line
    )
    options = ("--chip", "910A") if "910A" in name else ()
    code, found, _ = rehearse("python", script, options=options)
    named = [one for one in found["findings"] if one["kind"] == kind]
    assert named, found["findings"]
    assert named[0]["place"] == f"{script}:{number}"
    assert wanted in named[0]["what"]
    assert code == (0 if kind in {"double", "host"} else 1)
    assert "neither the numerics nor the speed" in found["caution"]


def test_a_source_is_read_to_its_end(tmp_path: Path) -> None:
    """A run stops at the first mistake; reading finds the others."""
    script = tmp_path / "port.py"
    script.write_text(
        "import torch\nimport xformers.ops\nx = torch.ones(3).to('cuda')\ny = x.double()\n"
        "z = torch.cuda.synchronize()\n",
        "utf-8",
    )
    _, found, _ = rehearse("python", script)
    source = {one["place"].split(":")[-1] for one in found["findings"] if one["kind"] == "source"}
    assert source == {"2", "3", "4", "5"}


def test_a_picture_is_rehearsed(tmp_path: Path) -> None:
    place = tmp_path / "a.png"
    words = ("generate", "a red boat", "--seed", 3, "--output", place, "-q")
    code, found, _ = rehearse(*words, options=("--chip", "310P3"))
    assert code == 0
    assert place.is_file()
    assert found["chip"] == "310P3"
    assert found["findings"] == []
    assert found["memory"][0]["peak"] > 15e6
    assert found["totals"]["calls"] > 500


def test_what_cannot_be_rehearsed(tmp_path: Path) -> None:
    for words, wanted in (
        (("rehearse",), "nothing to rehearse"),
        (("rehearse", "--chip", "911X", "--", "doctor"), "unknown chip"),
        (("rehearse", "--", "python", tmp_path / "none.py"), "script not found"),
    ):
        done = run_danqing(*words)
        assert done.returncode == 2
        assert wanted in done.stderr


def test_without_a_compiler_it_says_what_is_missing(tmp_path: Path) -> None:
    home = tmp_path / "cache"
    environment = {**os.environ, "XDG_CACHE_HOME": str(home), "PATH": str(tmp_path)}
    done = run_danqing("rehearse", "--", "doctor", env=environment)
    assert done.returncode == 8
    assert "g++, ninja" in done.stderr
    assert "apt-get install" in done.stderr


def test_two_cards(tmp_path: Path) -> None:
    words = ("generate", "a boat", "--device", "npu:1", "--seed", 3, "-q", "-o", tmp_path / "a.png")
    code, found, _ = rehearse(*words, options=("--cards", 2))
    assert code == 0
    assert found["memory"][0]["given"] == 0
    assert found["memory"][1]["peak"] > 10e6
    code, _, said = rehearse(
        "generate", "a boat", "--device", "npu:2", "-q", options=("--cards", 2)
    )
    assert code == 4
    assert "npu:0, npu:1" in said


def test_components_on_two_cards() -> None:
    """FLUX.1 and DeepGen-1.0 with a part of each on another card, or on the CPU: the same bits."""
    program = """
import json, tempfile
from pathlib import Path
from PIL import Image
from danqing.devices import import_torch
torch = import_torch()
from danqing.devices.simulated import install
native = install("910B3", devices=2).native
torch.set_num_threads(1)
import danqing
from tests import deepgen_toys, toys
home = Path(tempfile.mkdtemp())
flux, deepgen = toys.write_diffusers(home / "f"), deepgen_toys.write(home / "d")
small = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}
edit = {**small, "image": Image.new("RGB", (96, 64), "teal")}
found = []
for weights, settings, places in (
    (flux, small, ({"text_encoder_2": "npu:1"}, {"transformer": "npu:1"}, {"vae": "cpu"})),
    (deepgen, edit, ({"vlm": "npu:1"}, {"connector": "npu:1"}, {"transformer": "npu:1"},
                     {"vae": "npu:1"}, {"vlm": "cpu", "vae": "npu:1"})),
):
    with danqing.open(weights, device="cpu", dtype="float32") as engine:
        wanted = engine.generate("a boat", **settings).image.tobytes()
    for place in places:
        native.reset_peak(1)
        with danqing.open(weights, device="npu:0", dtype="float32", place=place) as engine:
            picture = engine.generate("a boat", **settings).pictures[0]
        found.append([
            place, picture.image.tobytes() == wanted, native.memory(1)["peak"],
            picture.provenance.device["places"] == place,
        ])
print(json.dumps(found))
"""
    found = json.loads(run_python("-c", program).stdout.splitlines()[-1])
    assert len(found) == 8
    for place, same, peak, told in found:
        assert same, place
        assert told, place
        assert (peak > 0) == ("npu:1" in place.values()), place


def test_what_cannot_be_placed() -> None:
    for words, wanted, code in (
        (("--place", "vlm"), "NAME=DEVICE", 2),
        (("--place", "brain=cpu"), "unknown component in --place", 2),
        (("--place", "vae=npu:7"), "npu is not available", 4),
    ):
        done = call_danqing("generate", "a boat", "--dry-run", *words)
        assert done.returncode == code, done.stderr
        assert wanted in done.stderr


def test_attention_of_the_npu() -> None:
    """npu_fusion_attention takes the inverse of a boolean mask, whole; an additive one is torch's."""
    program = """
import json, sys, types
from danqing.devices import import_torch
torch = import_torch()
from danqing.devices.simulated import install
install("910B3")
torch.set_num_threads(1)
import danqing
from danqing import devices
from danqing.devices import ascend_kernels
from danqing.networks.kernels import attention
device = devices.select("npu").device
own = device.attentions
sdpa = torch.nn.functional.scaled_dot_product_attention
random = torch.Generator().manual_seed(0)
query, key, value = (torch.randn(2, 3, n, 8, generator=random) for n in (5, 7, 7))
found = {"names": sorted(own)}
masks = {
    "none": None,
    "row": torch.rand(2, 1, 1, 7, generator=random) > 0.3,
    "whole": torch.rand(2, 3, 5, 7, generator=random) > 0.3,
    "flat": torch.rand(5, 7, generator=random) > 0.3,
    "additive": torch.randn(2, 1, 5, 7, generator=random),
}
for name, mask in masks.items():
    if mask is not None and mask.dtype is torch.bool:
        mask[..., 0] = True
    before = ascend_kernels.CALLS["fusion_attention"]
    with attention("npu", device):
        there = sdpa(*(one.npu() for one in (query, key, value)),
                     attn_mask=None if mask is None else mask.npu())
    here = sdpa(query, key, value, attn_mask=mask)
    ran = ascend_kernels.CALLS["fusion_attention"] - before
    found[name] = [float((there.cpu() - here).abs().max()), ran]
with danqing.open("pocket", device="npu", dtype="float32", attention="npu") as engine:
    there = engine.generate("a boat", seed=3).image.tobytes()
with danqing.open("pocket", device="cpu", dtype="float32") as engine:
    found["picture"] = engine.generate("a boat", seed=3).image.tobytes() == there
stub = types.ModuleType("mindiesd")
stub.__spec__ = types.SimpleNamespace()
calls = []
def attention_forward(query, key, value, *, scale, op_type, input_layout):
    calls.append([op_type, input_layout])
    return sdpa(query, key, value, scale=scale)
stub.attention_forward = attention_forward
sys.modules["mindiesd"] = stub
found["with mindie"] = sorted(device.attentions)
with danqing.open("pocket", device="npu", dtype="bfloat16", attention="mindie") as engine:
    there = engine.generate("a boat", seed=3).image.tobytes()
with danqing.open("pocket", device="cpu", dtype="bfloat16") as engine:
    found["mindie"] = [engine.generate("a boat", seed=3).image.tobytes() == there, len(calls) > 0]
print(json.dumps(found))
"""
    found = json.loads(run_python("-c", program).stdout.splitlines()[-1])
    assert found["names"] == ["npu"]
    for name in ("none", "row", "whole", "flat"):
        far, ran = found[name]
        assert far < 1e-6, name
        assert ran == 1, name
    assert found["additive"][0] < 1e-6
    assert found["additive"][1] == 0
    assert found["picture"] is True
    assert found["with mindie"] == ["mindie", "npu"]
    assert found["mindie"] == [True, True]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--compile", "npugraph"), "allowed: off, inductor"),
        (("--compile", "torchair"), "allowed: off, inductor"),
        (("--fused", "group_norm_silu"), "allowed: auto, off"),
        (("--attention", "npu"), "allowed: auto, torch, math, flash"),
        (("--attention", "mindie"), "allowed: auto, torch, math, flash"),
    ],
)
def test_what_only_an_npu_has_is_refused_elsewhere(words: tuple[str, str], wanted: str) -> None:
    done = call_danqing("generate", "a boat", "--device", "cpu", "--dry-run", *words)
    assert done.returncode == 4
    assert wanted in done.stderr
