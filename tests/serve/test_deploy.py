"""The recipes in deploy/ are linted; nothing here can build or start them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.ascend"])
def test_dockerfiles(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    ran = subprocess.run([hadolint, DEPLOY / name], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_unit(tmp_path: Path) -> None:
    """By systemd's own checker, which comes with systemd alone: containers and macOS have none."""
    unit = tmp_path / "danqing.service"
    text = (DEPLOY / "danqing.service").read_text().replace("/opt/danqing/bin/danqing", "/bin/true")
    unit.write_text(text)
    ran = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.ascend", "danqing.service"])
def test_flags_exist(name: str) -> None:
    from typer.testing import CliRunner

    from danqing.cli import app

    text = CliRunner().invoke(app, ["serve", "--help"]).stdout
    recipe = (DEPLOY / name).read_text()
    [line] = [one for one in recipe.splitlines() if one.startswith(("ENTRYPOINT", "ExecStart"))]
    flags = [
        word.strip('",') for word in line.replace('", "', " ").split() if word.startswith("--")
    ]
    assert flags
    assert all(flag in text for flag in flags)
