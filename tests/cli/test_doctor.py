"""`danqing doctor` on machines where anything may be broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.conftest import run_danqing
from tests.marks import slow_among

if TYPE_CHECKING:
    from pathlib import Path


def test_a_sound_machine() -> None:
    child = run_danqing("doctor", "--json")
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert report["usable"] is True
    assert report["problems"] == []
    assert report["versions"]["torch"]
    assert report["system"]["memory_bytes"] > 2**30
    cpu = report["devices"]["cpu"]["devices"][0]
    assert cpu["dtypes"]["float32"] == "native"
    assert set(report["devices"]) == {"cuda", "npu", "xpu", "mps", "cpu"}


@pytest.mark.slow
def test_text_for_people() -> None:
    text = run_danqing("doctor").stdout
    assert "this machine can paint" in text
    assert "processor" in text


BREAK = {
    "torch": (
        "raise OSError('libtorch_cpu.so: cannot open shared object file')",
        "libtorch_cpu.so",
    ),
    "diffusers": ("raise ImportError('cannot import name x')", "cannot import name x"),
    "transformers": ("raise RuntimeError('bad metadata')", "bad metadata"),
    "safetensors": ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
    "PIL": ("syntax error here", "SyntaxError"),
}


@pytest.mark.parametrize(
    "library", slow_among(BREAK, ("diffusers", "transformers", "safetensors", "PIL"))
)
def test_broken_libraries_are_reported(library: str, tmp_path: Path) -> None:
    code, words = BREAK[library]
    (tmp_path / f"{library}.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "danqing", "doctor", "--json"]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert child.returncode == 8, child.stderr
    assert "Traceback" not in child.stderr
    report = json.loads(child.stdout)
    assert report["usable"] is False
    assert any(words in problem["what"] for problem in report["problems"]), report["problems"]
    assert all(problem["hint"] for problem in report["problems"])


def test_generate_without_torch_is_an_error_not_a_crash(schnell: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    child = run_danqing(
        "generate", "a cat", "-m", schnell, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert child.returncode == 8
    assert "no torch here" in child.stderr
    assert "danqing doctor" in child.stderr


def test_a_bad_request_is_refused_before_torch_is_imported(schnell: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for wrong in (("--guidance", 4), ("--seed", -1), ("-o", "x.gif"), ("-m", "nowhere")):
        child = run_danqing("generate", "a cat", "-m", schnell, *wrong, env=environment)
        assert child.returncode in (2, 3), child.stderr
        assert "torch" not in child.stderr
