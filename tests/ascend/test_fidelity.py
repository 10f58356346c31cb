"""Huawei's own torch_npu 2.13.0, on a CPU, over a stand-in CANN: `make test-ascend`.

It proves the way through torch_npu: its import, its allocator, its dispatch, its error texts. It
proves neither the numerics nor the speed of an NPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ascend, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
IN_FLOAT32 = 1e-5


@pytest.fixture(scope="module", autouse=True)
def wheel() -> None:
    if importlib.util.find_spec("torch_npu") is None:
        pytest.fail("torch_npu is not installed here: run make test-ascend")


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            **environment,
        },
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def program(text: str, **environment: str) -> Any:
    """Run a program after the stand-in is loaded; it puts what it found into `found`."""
    head = (
        "import json\nfrom tests.ascend import standin\nlibrary = standin.load()\n"
        "import torch\nfound = {}\n"
    )
    done = run("-c", head + textwrap.dedent(text) + "\nprint(json.dumps(found))", **environment)
    return json.loads(done.stdout.splitlines()[-1])


def told(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def plain() -> tuple[Any, str]:
    done = run("-m", "tests.ascend.pictures")
    return told(done), done.stderr


@pytest.fixture(scope="module")
def fused() -> Any:
    return told(run("-m", "tests.ascend.pictures", "all"))


def test_pictures_are_the_cpus(plain: tuple[Any, str]) -> None:
    """FLUX.1 and DeepGen-1.0, words and edits, both dtypes, both placements."""
    pictures = plain[0]["pictures"]
    assert len(pictures) == 12
    for name, found in pictures.items():
        limit = IN_FLOAT32 if "float32" in name and "bfloat16" not in name else 0.05
        assert max(found["far"].values()) <= limit, name
        assert sum(found["kernels"].values()) > 500, name
    for name in ("deepgen", "edit"):
        assert max(pictures[f"{name} float32 resident"]["far"].values()) == 0


def test_nothing_of_it_runs_on_the_host(plain: tuple[Any, str]) -> None:
    said = plain[1] + str(plain[0]["warnings"])
    for text in ("fall back to run on the CPU", "Now this kernel is running on CPU"):
        assert text not in said


def test_gelu_is_the_one_asked_for(plain: tuple[Any, str]) -> None:
    """torch_npu's own F.gelu takes one kernel for both formulas."""
    for name, found in plain[0]["pictures"].items():
        assert "aclnnGelu" not in found["kernels"], name
        assert found["kernels"]["aclnnGeluV2"] > 0, name
    found = program(
        """
        import torch_npu
        x = torch.linspace(-3, 3, 64)
        gelu = torch.nn.functional.gelu
        def gap(how):
            return float((gelu(x.npu(), approximate=how).cpu() - gelu(x, approximate=how)).abs().max())
        found["before"] = {how: gap(how) for how in ("none", "tanh")}
        from danqing.devices.ascend_kernels import honour_gelu
        found["done"] = honour_gelu()
        found["after"] = {how: gap(how) for how in ("none", "tanh")}
        """
    )
    assert max(found["before"].values()) > 1e-4  # whichever of the two the kernel computes
    assert found["done"] is True
    assert max(found["after"].values()) < 1e-6


def test_fused_kernels_run_and_change_nothing(plain: tuple[Any, str], fused: Any) -> None:
    for name, found in fused["pictures"].items():
        before, after = plain[0]["pictures"][name]["kernels"], found["kernels"]
        assert sum(after.values()) < sum(before.values()), name
        assert after["aclnnGroupNormSilu"] >= 21, name
        if name.startswith("flux"):
            assert after["aclnnRmsNorm"] == 24, name
            assert after["aclnnRotaryPositionEmbeddingV2"] == 16, name
        limit = IN_FLOAT32 if " float32" in name else 0.05
        assert max(found["far"].values()) <= limit, name


def test_device_contract() -> None:
    found = program(
        """
        from tests.devices.contract import look
        found.update(look("npu:0"))
        """
    )
    assert found["name"] == "npu:0"
    assert found["chip"] == "Ascend910B3"
    assert found["driver"] == "torch_npu 2.13.0"
    assert found["memory"][1] == 64 * 2**30
    assert found["grown"] >= 32 * 2**20
    assert found["out_of_memory"] is True
    assert found["other_error"] is False
    assert found["dtypes"] == dict.fromkeys(("float32", "bfloat16", "float16"), "native")
    assert found["peaks"]["bfloat16"] == 294.9e12
    assert found["deterministic"] == [True, False]


@pytest.mark.parametrize(("soc", "bfloat16"), [("Ascend910A", "no"), ("Ascend310P3", "no")])
def test_older_chips_have_no_bfloat16(soc: str, bfloat16: str) -> None:
    found = program(
        """
        from danqing import devices
        device = devices.select("npu").device
        found["bfloat16"] = device.computes("bfloat16")
        found["float16"] = device.computes("float16")
        """,
        STANDIN_SOC=soc,
    )
    assert found == {"bfloat16": bfloat16, "float16": "native"}


def test_operators_are_read_from_the_wheel() -> None:
    """A rehearsal knows what the torch_npu that is installed registers."""
    done = run(
        "-c",
        "from danqing.devices.simulated import install; import json\n"
        "from danqing.devices.simulated.install import read_names, registered_operators\n"
        "print(json.dumps([registered_operators(), read_names('registered.txt')]))",
    )
    wheel, ours = map(set, json.loads(done.stdout.splitlines()[-1]))
    assert len(wheel) > 1000
    assert ours <= wheel


def test_compilers_are_there_or_refused() -> None:
    found = program(
        """
        from danqing import devices
        from danqing.errors import KernelError
        device = devices.select("npu").device
        for name in ("npugraph", "torchair", "inductor"):
            try:
                found[name] = str(device.compiler(name))
            except KernelError as error:
                found[name] = "refused: " + error.what
        """
    )
    assert found["npugraph"].startswith("npugraph") or found["npugraph"].startswith("refused")
    assert found["torchair"].startswith("refused") or "npu_backend" in found["torchair"]
    assert found["inductor"].startswith("refused: unknown compiler on npu:0")


def test_first_things() -> None:
    """What torch_npu would do otherwise, and is not done."""
    found = program(
        """
        import warnings
        from danqing import devices
        found["before"] = [torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32]
        device = devices.select("npu").device
        device.prepare()
        found["after"] = [torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32]
        with warnings.catch_warnings(record=True) as said:
            device.prepare()
            warnings.warn("Warning: The /usr/local/Ascend owner does not match the current owner.")
            warnings.warn("something else")
        found["said"] = [str(one.message) for one in said]
        """
    )
    assert found["before"] == [True, False]
    assert found["after"] == [False, False]
    assert found["said"] == ["something else"]


def test_two_cards() -> None:
    found = program(
        """
        import danqing
        with danqing.open("pocket", device="npu:1", dtype="float32") as engine:
            picture = engine.generate("a red boat", seed=3).pictures[0]
        found["device"] = picture.provenance.device["name"]
        found["peaks"] = [torch.npu.max_memory_allocated(index) for index in (0, 1)]
        """
    )
    assert found["device"] == "npu:1"
    assert found["peaks"][0] == 0
    assert found["peaks"][1] > 10e6


def test_deterministic_kernels_are_asked_for() -> None:
    """Torch's switch and the libraries' settings; what CANN makes of them is not seen here."""
    found = program(
        """
        import os
        from danqing import devices
        device = devices.select("npu").device
        device.prepare()
        with device.deterministic(True):
            found["inside"] = torch.are_deterministic_algorithms_enabled()
            found["sum"] = float((torch.ones(4, 4, device="npu:0") @ torch.ones(4, 4).npu()).sum())
            found["settings"] = [os.environ[name] for name in (
                "HCCL_DETERMINISTIC", "LCCL_DETERMINISTIC", "ATB_MATMUL_SHUFFLE_K_ENABLE",
            )]
        found["after"] = torch.are_deterministic_algorithms_enabled()
        """
    )
    assert found == {"inside": True, "sum": 64.0, "settings": ["true", "1", "0"], "after": False}


ERRORS = {
    "float64": (
        "torch.ones(4, dtype=torch.float64, device='npu:0').repeat_interleave(2, dim=0)",
        "does not take these arguments on this chip (161002)",
    ),
    "no such card": ("torch.ones(1, device='npu:7')", "there is no such card (107001)"),
    "mixed": (
        "torch.ones(3, device='npu:0').addcmul_(torch.ones(3), torch.ones(3))",
        "tensors of the card and of the CPU were mixed",
    ),
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_genuine_errors_are_explained(name: str) -> None:
    code, wanted = ERRORS[name]
    found = program(
        f"""
        from danqing import devices
        device = devices.select("npu").device
        device.prepare()
        try:
            {code}
            torch.npu.synchronize()
            found["meaning"] = None
        except RuntimeError as error:
            found["error"] = str(error)
            found["meaning"] = device.explain(error)
        """
    )
    assert found["meaning"], found
    assert wanted in found["meaning"][0], found


def test_out_of_memory_is_an_answer() -> None:
    found = program(
        """
        import danqing
        from danqing.errors import DoesNotFitError
        from danqing import devices
        devices.select("npu").device.prepare()
        held = torch.empty(40 * 2**20 // 4, device="npu:0")
        try:
            with danqing.open("pocket", device="npu:0", dtype="float32") as engine:
                engine.generate("a red boat", seed=3, height=1024, width=1024)
        except DoesNotFitError as error:
            found["error"] = str(error)
        """,
        STANDIN_GIB="0.12",
    )
    assert "npu:0" in found.get("error", ""), found


def test_traps_are_real_and_avoided() -> None:
    """torch_npu importable: diffusers' RMSNorm fails on a CPU, danqing's picture does not."""
    found = program(
        """
        import torch_npu, diffusers
        from diffusers.models.normalization import RMSNorm
        norm = RMSNorm(8, eps=1e-6)
        try:
            norm(torch.ones(1, 8))
            found["trap"] = "none"
        except NotImplementedError as error:
            found["trap"] = str(error)[:60]
        x = torch.ones(3, device="npu:0")
        found["double"] = str(x.double().dtype)
        try:
            torch.randn(2, device="npu:0", generator=torch.Generator())
        except RuntimeError as error:
            found["generator"] = str(error)
        """
    )
    assert "npu_rms_norm" in found["trap"]
    assert found["double"] == "torch.float32"
    assert "Expected a 'npu' device type for generator" in found["generator"]


def test_without_cann_doctor_explains_and_the_cpu_paints(tmp_path: Path) -> None:
    """The real wheel, no CANN at all: import torch itself would die."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    broken = subprocess.run(
        [sys.executable, "-c", "import torch"], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert broken.returncode != 0
    assert "libhccl.so" in broken.stderr
    doctor = subprocess.run(
        [sys.executable, "-m", "danqing", "doctor"], capture_output=True, text=True,
        env=environment, check=False,
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stderr
    assert "CANN is not there or its environment is not set" in doctor.stdout
    assert "set_env.sh" in doctor.stdout
    painted = subprocess.run(
        [sys.executable, "-m", "danqing", "generate", "a boat", "-q", "-o", str(tmp_path / "a.png")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert painted.returncode == 0, painted.stderr
    refused = subprocess.run(
        [sys.executable, "-m", "danqing", "generate", "a boat", "--device", "npu"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert refused.returncode == 4
    assert "source /usr/local/Ascend" in refused.stderr


def test_a_wrong_home_is_named(tmp_path: Path) -> None:
    done = run("-m", "danqing", "doctor", ASCEND_HOME_PATH=str(tmp_path / "nowhere"))
    assert "ASCEND_HOME_PATH" in done.stdout or "CANN" in done.stdout
