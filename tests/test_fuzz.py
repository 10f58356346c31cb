"""The fuzz targets: all committed inputs in every run, and a minute of mutations in the slow ones.

`fuzz/corpus` holds inputs to start with and the input of each fault that was found.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.engine import CASE_SECONDS, Target, confirm, fuzz, run_case
from fuzz.mutation import mutate
from fuzz.targets import TARGETS

ROOT = Path(__file__).parent.parent
IN_PROCESS = sorted(name for name in TARGETS if TARGETS[name].warm)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_committed_inputs(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    inputs = target.inputs()
    assert inputs
    for path in inputs:
        run_case(target, path.read_bytes(), tmp_path)


def test_committed_inputs_of_the_server() -> None:
    """In a process of its own: they start threads and loops."""
    for name in sorted(set(TARGETS) - set(IN_PROCESS)):
        assert TARGETS[name].inputs()
    code = (
        "import sys, tempfile\n"
        "from pathlib import Path\n"
        "from fuzz.engine import run_case\n"
        "from fuzz.targets import TARGETS\n"
        "for name in sys.argv[1:]:\n"
        "    for path in TARGETS[name].inputs():\n"
        "        print(path, flush=True)\n"
        "        with tempfile.TemporaryDirectory() as folder:\n"
        "            run_case(TARGETS[name], path.read_bytes(), Path(folder))\n"
        "import os\n"
        "os._exit(0)\n"
    )
    names = sorted(set(TARGETS) - set(IN_PROCESS))
    child = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout[-300:] + child.stderr[-2000:]


def hang(data: bytes, folder: Path) -> None:
    if data == b"hang":
        while True:
            pass


def grow(data: bytes, folder: Path) -> None:
    rows = []
    while True:
        rows.append(bytearray(1 << 26))


def crash(data: bytes, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(data: bytes, folder: Path) -> None:
    raise IndexError


@pytest.mark.parametrize(("fault", "why"), [(crash, "ended with -9"), (fail, "an exception")])
def test_faults_are_found(
    fault: object, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz.engine.HERE", tmp_path)
    target = Target(name="faulty", run=fault, warm=False)  # type: ignore[arg-type]
    result = fuzz(target, seconds=0.3, seed=1)
    assert result.findings
    assert why in result.findings[0][0]
    assert result.findings[0][1].parent == tmp_path / "findings" / "faulty"


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "why"), [(hang, "seconds"), (grow, "MiB")])
def test_hangs_and_growth_are_found(fault: object, why: str) -> None:
    target = Target(name="faulty", run=fault, warm=False)  # type: ignore[arg-type]
    assert why in (confirm(target, b"hang") or "")


def test_mutations_repeat_with_their_seed() -> None:
    data = b'{"a": [1, 2, {"b": "text"}]}'
    both = [
        [mutate(data, "json", dice, [data]) for _ in range(200)]
        for dice in (random.Random(3), random.Random(3))
    ]
    assert both[0] == both[1]
    assert len(set(both[0])) > 100


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_minute_of_fuzzing() -> None:
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fuzz", "--seconds", "60", "--seed", "19"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(child.stdout)
    assert child.returncode == 0, child.stdout + child.stderr[-4000:]
    assert CASE_SECONDS <= 10
