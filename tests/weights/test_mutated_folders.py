"""Whole model folders with one file damaged: sound, or a documented error, in bounded time."""

from __future__ import annotations

import collections
import resource
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from danqing import models
from danqing.errors import DanqingError
from danqing.models.preflight import preflight
from tests.weights import mutators

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 10
"""The most that one case may take."""
GROWTH = 1 << 20
"""KiB that the process may grow by over all cases."""


class TooSlow(BaseException):
    """No `Exception`, which code under test may handle."""


def look(folder: Path) -> str:
    """Open and check a model, and load its tokenizers and its plan's notes; return the verdict."""
    try:
        checkpoint = models.open_checkpoint(folder)
        found = preflight(checkpoint)
        for error in (found.fault, *(part.fault for part in found.findings)):
            if error is not None:
                raise error
        model = models.open_model(checkpoint, models.identify(checkpoint))
        for encoder in (slot.name for slot in model.slots if slot.tokenizer):
            model.tokenizer(encoder)
        model.assumptions()
    except DanqingError as error:
        return type(error).__name__
    return "sound"


def run(folder: Path, chosen: list[mutators.Case]) -> dict[str, int]:
    """Apply each damage to the folder, look at it, and put the file back."""

    def stop(*_: object) -> None:
        raise TooSlow

    verdicts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    slowest = (0.0, "")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, stop)
    try:
        for case in chosen:
            kept = case.path.read_bytes()
            case.apply(case.path)
            started = time.perf_counter()
            signal.alarm(SECONDS)
            try:
                verdicts[look(folder)] += 1
            except BaseException as error:
                wrong.append(f"{case.name}: {type(error).__name__}: {str(error)[:200]}")
            finally:
                signal.alarm(0)
                _restore(case.path, kept)
            slowest = max(slowest, (time.perf_counter() - started, case.name))
    finally:
        signal.signal(signal.SIGALRM, old)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{len(chosen)} cases: {dict(verdicts)}, slowest {slowest}, {grown} KiB more")
    assert not wrong, "\n".join(wrong)
    assert look(folder) == "sound"
    assert grown < GROWTH
    return verdicts


def _restore(path: Path, data: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def folders(
    schnell: Path, deepgen: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("mutated")
    return {
        "flux": shutil.copytree(schnell, home / "flux"),
        "deepgen": shutil.copytree(deepgen, home / "deepgen"),
    }


@pytest.mark.finding(6)
@pytest.mark.parametrize("model", ["flux", "deepgen"])
def test_a_damaged_file_is_a_documented_error(folders: dict[str, Any], model: str) -> None:
    run(folders[model], mutators.cases(folders[model], seed=3)[:40])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["flux", "deepgen"])
def test_every_damage_is_a_documented_error(folders: dict[str, Any], model: str) -> None:
    run(folders[model], mutators.cases(folders[model], seed=7))
