"""Toy checkpoints, made once for each process of the test run, and ways to call danqing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

import danqing
from tests import deepgen_toys, toys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the reference implementations must not ask a hub either
torch.set_num_threads(1)  # bit-equality is promised for one number of threads


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests that share a server run in one process."""
    for item in items:
        if "tests/serve/" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("serve"))


@pytest.fixture(scope="session")
def toy_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="session")
def schnell(toy_home: Path) -> Path:
    return toys.write_diffusers(toy_home / "schnell")


@pytest.fixture(scope="session")
def dev(toy_home: Path) -> Path:
    return toys.write_diffusers(toy_home / "dev", guided=True, seed=1)


@pytest.fixture(scope="session")
def schnell_bfl(schnell: Path, toy_home: Path) -> Path:
    return toys.write_bfl(toy_home / "schnell-bfl", schnell)


@pytest.fixture(scope="session")
def dev_bfl(dev: Path, toy_home: Path) -> Path:
    return toys.write_bfl(toy_home / "dev-bfl", dev)


@pytest.fixture(scope="session")
def deepgen(toy_home: Path) -> Path:
    return deepgen_toys.write(toy_home / "deepgen")


@pytest.fixture(scope="session")
def engine(schnell: Path) -> Iterator[danqing.Engine]:
    with danqing.open(schnell, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="session")
def dev_engine(dev: Path) -> Iterator[danqing.Engine]:
    with danqing.open(dev, device="cpu") as engine:
        yield engine


@dataclass(frozen=True)
class Ran:
    """What a command did in this process, named as `subprocess.CompletedProcess` names it."""

    returncode: int
    stdout: str
    stderr: str


def call_danqing(*arguments: object) -> Ran:
    """Run a command in this process: where no signal, environment or exit is under test."""
    from danqing.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return Ran(result.exit_code, result.stdout, result.stderr)


def run_danqing(
    *arguments: object, cwd: Path | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "danqing", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        check=False,
        **options,
    )
