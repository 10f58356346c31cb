"""Devices: the contract every family keeps, and the exact reason why one is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from danqing import devices
from danqing.errors import DeviceUnavailableError, UnknownDeviceError
from tests.marks import slow_among

if TYPE_CHECKING:
    from pathlib import Path

HERE = [family for family in devices.FAMILIES if devices.availability(family).count]


@pytest.mark.parametrize("family", HERE)
def test_contract(family: str) -> None:
    device = devices.select(family).device
    device.prepare()
    assert device.name.startswith(family)
    assert device.chip
    memory = device.memory()
    assert memory is None or 0 <= memory.free_bytes <= memory.total_bytes
    assert device.computes("float32") == "native"
    assert {device.computes(dtype) for dtype in ("bfloat16", "float16")} <= {
        "native",
        "emulated",
        "no",
    }
    device.synchronize()
    device.reset_peak()
    held = torch.ones(8 * 2**20, device=device.torch_device)  # 32 MiB
    held += 1
    device.synchronize()
    peak = device.peak_bytes()
    assert peak is None or peak >= held.nbytes
    del held
    device.release()
    assert not device.is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize("family", [name for name in devices.FAMILIES if name not in HERE])
def test_what_is_not_here_says_why(family: str) -> None:
    found = devices.availability(family)
    assert found.reason
    with pytest.raises(DeviceUnavailableError) as caught:
        devices.select(f"{family}:0")
    assert found.reason in str(caught.value)


def test_auto_says_what_it_passed_over() -> None:
    selection = devices.select("auto")
    assert selection.device.family == HERE[0]
    for family in devices.FAMILIES:
        if family == HERE[0]:
            break
        assert f"no {family}" in selection.reason


@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "npu:x", "0", "cuda:0:1"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UnknownDeviceError):
        devices.select(name)


def test_cpu_out_of_memory_is_recognised() -> None:
    cpu = devices.select("cpu").device
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert cpu.is_out_of_memory(caught.value)


# --- torch_npu that is broken in the ways it really breaks --------------------------------------

NO_CANN = "libhccl.so: cannot open shared object file: No such file or directory"
BROKEN = {
    "no CANN": (f"raise ImportError({NO_CANN!r})", "CANN is not there"),
    "bad ASCEND_HOME_PATH": (
        'raise Exception("ASCEND_HOME_PATH does not exist. ERR00008 PTA resource not found")',
        "points to no complete CANN",
    ),
    "beside CUDA": (
        'raise RuntimeError("Two accelerators cannot be used at the same time. ERR00007")',
        "beside a CUDA build",
    ),
    "another torch": (
        'raise ImportError("libtorch_npu.so: undefined symbol: _ZN3c1010TensorImplE")',
        "does not fit this torch",
    ),
    "driver": (
        ('import torch\nclass npu:\n    is_available = staticmethod(lambda: True)\n'
        '    @staticmethod\n    def device_count(): raise RuntimeError("error code is 107001")\n'
        "torch.npu = npu"),
        "driver does not answer for this card",
    ),
    "no card": (
        "import torch\nclass npu:\n    is_available = staticmethod(lambda: False)\ntorch.npu = npu",
        "no card is visible",
    ),
    "a crash": ("import os\nos.abort()", "aborts while it is loaded: the process ended with status -6"),
    "something new": ('raise ValueError("surprise")', "fails: ValueError: surprise"),
}  # fmt: skip


BREAK_LATER = ("driver", "no card")


@pytest.fixture
def broken(case: str, tmp_path: Path) -> tuple[dict[str, str], str]:
    """An environment with a torch_npu that breaks, autoload entry point and all."""
    code, words = BROKEN[case]
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(code + "\ndef _autoload(): pass\n")
    info = tmp_path / "torch_npu-2.13.0.dist-info"
    info.mkdir()
    version = torch.__version__.split("+")[0]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "ASCEND_RT_VISIBLE_DEVICES": "3"}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    if "+cu" in torch.__version__:  # that alone is reason enough, and seen first
        words = "beside a CUDA build"
    return environment, words


def run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "danqing", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.mark.parametrize("case", [name for name in BROKEN if name not in BREAK_LATER])
def test_the_trap_is_real(broken: tuple[dict[str, str], str]) -> None:
    """With such a package installed, `import torch` itself fails: this is what danqing avoids."""
    environment, _ = broken
    command = [sys.executable, "-c", "import torch"]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode


CASES = slow_among(BROKEN, BROKEN.keys() - {"a crash"})
"""What each says is tested by its text in test_ascend_doctor.py; these break real processes."""


@pytest.mark.parametrize("case", CASES)
def test_a_broken_torch_npu_is_explained_and_the_cpu_goes_on_painting(
    broken: tuple[dict[str, str], str], schnell: Path, tmp_path: Path
) -> None:
    environment, words = broken
    asked = run(environment, "generate", "a cat", "-m", schnell, "--device", "npu", "-q")
    assert asked.returncode == 4
    assert words in asked.stderr, asked.stderr
    assert "Traceback" not in asked.stderr
    target = tmp_path / "cpu.png"
    arguments = ("-m", schnell, "--device", "cpu", "-q", "--size", "64x64", "-o", target)
    painted = run(environment, "generate", "a cat", *arguments)
    assert painted.returncode == 0, painted.stderr
    assert target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_doctor_survives_a_broken_torch_npu(broken: tuple[dict[str, str], str]) -> None:
    environment, words = broken
    child = run(environment, "doctor", "--json")
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert words in report["devices"]["npu"]["reason"]
    assert report["devices"]["cpu"]["count"] == 1


def test_autoload_setting_does_not_leak() -> None:
    """The program that uses danqing keeps its environment."""
    code = (
        "import os, danqing.devices as d; d.import_torch(); "
        "assert 'TORCH_DEVICE_BACKEND_AUTOLOAD' not in os.environ"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
