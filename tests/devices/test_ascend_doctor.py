"""What doctor says of broken installations: the texts are those that real stacks print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from danqing.devices.ascend_doctor import TROUBLES, before_loading, explain
from danqing.devices.ascend_errors import explain as explain_error

SO = "cannot open shared object file: No such file or directory"
BROKEN = {
    "no CANN": (f"ImportError: libhccl.so: {SO}", "CANN is not there", "set_env.sh"),
    "no CANN, older": (f"ImportError: libascendcl.so: {SO}", "CANN is not there", "set_env.sh"),
    "no driver in a container": (
        f"ImportError: libascend_hal.so: {SO}", "driver's libraries are not found", "mount it"),
    "no ATB": (f"OSError: libatb.so: {SO}", "wants ATB", "nnal/atb/set_env.sh"),
    "no kernels": (f"RuntimeError: libopapi.so: {SO}", "operators are not there", "kernels package"),
    "torch gone": (f"ImportError: libtorch_cpu.so: {SO}", "does not find torch", "same environment"),
    "wheel of arm on x86": (
        "ImportError: libtorch_npu.so: wrong ELF class: ELFCLASS32", "another processor", "architecture"),
    "old system": (
        "ImportError: /lib64/libstdc++.so.6: version `GLIBCXX_3.4.30' not found",
        "older than torch_npu needs", "newer system"),
    "beside CUDA": (
        "RuntimeError: Two accelerators cannot be used at the same time in PyTorch. ERR00007 PTA", "beside a CUDA build", "CPU build"),
    "another torch": (
        "ImportError: libtorch_npu.so: undefined symbol: _ZN3c1010TensorImplE",
        "does not fit this torch", "release made for this torch"),
    "wrong home": (
        "Exception: ASCEND_HOME_PATH does not exist. ERR00008 PTA resource not found.",
        "points to no complete CANN", "set_env.sh"),
    "wrong operators": (
        "Exception: ASCEND_OPP_PATH environment variable is not set.", "ASCEND_OPP_PATH says", "set_env.sh"),
    "no tbe": ("ModuleNotFoundError: No module named 'tbe'", "PYTHONPATH is not set", "set_env.sh"),
    "no yaml": ("ModuleNotFoundError: No module named 'yaml'", "library that torch_npu or CANN", "pyyaml"),
    "no decorator": ("ModuleNotFoundError: No module named 'decorator'", "is missing", "decorator"),
    "numpy 2": (
        "A module that was compiled using NumPy 1.x cannot be run in NumPy 2.0.1",
        "another major version of numpy", "numpy<2"),
    "no permission": (
        "RuntimeError: open /dev/davinci0 failed: Permission denied", "may not use the card", "HwHiAiUser"),
    "driver not started": (
        "RuntimeError: Initialize:torch_npu error code is 507899", "driver could not be started", "npu-smi"),
    "no such card": (
        "RuntimeError: NPU function error: c10_npu::SetDevice, error code is 107001\n[Error]: Invalid device ID.",
        "does not answer for this card", "ASCEND_RT_VISIBLE_DEVICES"),
    "no context": ("RuntimeError: error code is 107002", "no context", "npu-smi"),
    "memory taken": ("RuntimeError: error code is 207001", "memory is taken", "who uses it"),
    "broken memory": ("RuntimeError: error code is 507054", "cannot be corrected", "ecc"),
    "card lost": ("RuntimeError: error code is 507057", "failed while it was started", "health"),
    "firmware too old": (
        "RuntimeError: error code is 500001\nEZ9999: Inner Error!", "failed inside", "one release"),
    "driver silent": ("RuntimeError: drvGetDevNum failed, drvRet=87", "driver does not answer", "npu-smi"),
    "hangs": ("torch_npu did not answer within 120 s", "hangs", "health"),
    "crashes": ("the process ended with status -11", "crashes while it is loaded", "one release"),
    "killed": ("the process ended with status -9", "killed the process", "host memory"),
    "something new": ("ValueError: surprise", "fails: ValueError: surprise", "import torch_npu"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BROKEN))
def test_what_doctor_says(name: str) -> None:
    text, wanted, cure = BROKEN[name]
    reason, hint = explain(f"Traceback (most recent call last):\n  ...\n{text}")
    assert wanted in reason
    assert cure in hint


def test_each_trouble_is_tested() -> None:
    reasons = {explain(text)[0].split(" (")[0] for text, *_ in BROKEN.values()}
    untested = {one.reason for one in TROUBLES} - reasons
    assert {one for one in untested if "status -6" not in one} == set()


@pytest.mark.parametrize(
    ("versions", "options", "wanted"),
    [
        (("2.9.0.post2", "2.13.0+cpu"), {}, "torch_npu 2.9.0.post2 is made for torch 2.9"),
        (("2.13.0", "2.13.0+cu128"), {}, "beside a CUDA build"),
        (("2.13.0", "2.13.0+cpu"), {"visible": ""}, "is empty"),
        (("2.13.0", "2.13.0+cpu"), {"visible": "0, 1"}, "cannot be read"),
        (("2.13.0", "2.13.0+cpu"), {"visible": "npu0"}, "cannot be read"),
        (("2.13.0", "2.13.0+cpu"), {"visible": "2,1"}, "does not rise"),
        (("2.13.0", "2.13.0+cpu"), {"cards": [Path("/dev/davinci0")]}, "may not use the card"),
        (("2.13.0", "2.13.0+cpu"), {"visible": "0,1,3"}, None),
        (("2.9.0.post1+gitee7ba04", "2.9.0+cpu"), {}, None),
        (("", "2.13.0+cpu"), {}, None),
    ],
)
def test_what_is_seen_before_it_is_loaded(
    versions: tuple[str, str], options: dict[str, Any], wanted: str | None
) -> None:
    found = before_loading(*versions, **{"cards": [], "visible": None, **options})
    if wanted is None:
        assert found is None
    else:
        assert found is not None
        assert wanted in found[0]
        assert found[1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "call aclnnMm failed, error code is 161002\nEZ1001: self not implemented for DT_DOUBLE",
            "161002",
        ),
        (
            "error code is 507015\nEZ9999: The error from device",
            "the cube cores raised an exception",
        ),
        ("error code is 507018", "card's own CPU"),
        ("error code is 507014", "took too long on the cube cores"),
        ("error code is 507034", "took too long on the vector cores"),
        ("error code is 507046", "a stream did not end in time"),
        ("error code is 561103", "failed inside CANN"),
        ("EZ9999: Inner Error!", "CANN failed inside"),
        (
            "HcclCommInit EI0006: Getting socket times out. ERR02200 DIST call hccl api failed",
            "network",
        ),
    ],
)
def test_what_an_error_in_the_middle_means(text: str, wanted: str) -> None:
    found = explain_error(RuntimeError(text))
    assert found is not None
    assert wanted in found[0]
    assert found[1]
    assert explain_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
