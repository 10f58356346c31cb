"""`danqing doctor --paint`, and the first command of the README."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from danqing.errors import BrokenPictureError, RequestError
from danqing.pocket import suite
from danqing.weights import BUILT_IN
from tests.conftest import call_danqing, run_danqing

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_the_suite_in_a_process(tmp_path: Path) -> None:
    child = run_danqing("doctor", "--paint", "--device", "cpu", "--keep", tmp_path / "kept")
    assert child.returncode == 0, child.stdout + child.stderr
    assert f"{len(suite.CASES)} of {len(suite.CASES)} passed on cpu" in child.stdout
    assert child.stdout.count("passed  ") == len(suite.CASES)
    kept = sorted(path.stem for path in (tmp_path / "kept").iterdir())
    assert kept == sorted(case.name for case in suite.CASES)
    with Image.open(tmp_path / "kept" / "red-sun.png") as image:
        assert image.size == (128, 128)


@pytest.mark.slow
def test_the_suite_as_json() -> None:
    child = call_danqing("doctor", "--paint", "--device", "cpu", "--dtype", "float32", "--json")
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert report["passed"] is True
    assert report["dtype"] == "float32"
    assert len(report["cases"]) == len(suite.CASES)
    assert all(case["shown"] and case["passed"] for case in report["cases"])


def test_wrong_pictures_are_exit_code_6(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """References of another model stand for a device that paints something else."""
    from tests.cli.test_bad_input import invoke

    copied = tmp_path / "references"
    shutil.copytree(suite.REFERENCES, copied)
    for path in copied.glob("*.png"):
        Image.new("RGB", (128, 128), (120, 90, 60)).save(path)
    monkeypatch.setattr(suite, "REFERENCES", copied)
    code, text = invoke("doctor", "--paint", "--device", "cpu")
    assert code == BrokenPictureError.exit_code
    assert f"{len(suite.CASES)} of {len(suite.CASES)} failed" in text


def test_flags_of_the_suite_alone() -> None:
    from tests.cli.test_bad_input import invoke

    for flags in (("--device", "cpu"), ("--dtype", "float32"), ("--keep", "x")):
        code, text = invoke("doctor", *flags)
        assert code == RequestError.exit_code
        assert "--paint" in text


def test_the_first_command_of_the_readme_needs_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "three blue mountains under a red sun, a boat on the water"
    first = run_danqing("generate", prompt, "--seed", 3, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == "pocket-3.png"
    monkeypatch.chdir(tmp_path)
    again = call_danqing("generate", "--from", "pocket-3.png", "-o", "again.png")
    assert again.returncode == 0, again.stderr
    with Image.open(tmp_path / "pocket-3.png") as one, Image.open(tmp_path / "again.png") as two:
        assert one.tobytes() == two.tobytes()
        record = json.loads(one.info["danqing"])
    assert record["provenance"]["model"]["path"] == "pocket"
    assert BUILT_IN["pocket"].name not in json.dumps(record)
