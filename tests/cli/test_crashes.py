"""SIGKILL at random points of every command that writes: nothing half looks whole, all resumes.

A point is either a moment or the change of a file (made, renamed, linked, removed) before which the
process dies. After each kill every visible file must be one that the undisturbed run wrote; the same
command again must succeed, with the same images and tensors, and leave no temporary file behind.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from danqing.pictures import read_record
from danqing.report.document import read_report
from danqing.verify.trace import read_trace
from tests.forks import KILLED, Forks
from tests.hub import Hub
from tests.marks import slow_among

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUICK, MANY = 2, 25
TARGET_EXISTS = 7
TOY = ("--device", "cpu", "--height", 64, "--width", 64, "--seed", 1, "-q")
ROWS = '{"prompt": "a cat", "include": []}\n{"prompt": "a dog", "include": []}\n'
REPORT = (
    "--repeats", 1, "--batch", 0, "--no-cost", "--no-process", "--no-switches",
    "--require", "any", "--steps", 1,
)  # fmt: skip
COMMANDS: dict[str, tuple[Any, ...]] = {
    "generate": ("generate", "a cat", "-o", "out.png", "--prompt-cache", "prompts", "--overwrite", *TOY),
    "eval-set": (
        "eval-set", "geneval", "--prompts", "../../rows.jsonl", "--out", "set", "--steps", 1, *TOY,
    ),
    "trace": ("trace", "a cat", "--out", "a.trace", *TOY),
    "report": ("report", "a cat", "--out", "report", *REPORT, *TOY),
    "convert": ("convert", "SOURCE", "converted", "--layout", "bfl", "-q"),
}  # fmt: skip


@dataclass
class Victim:
    """A command that is killed again and again.

    Attributes:
        forks: runs it.
        words: of the command line.
        home: a folder for each run is made here.
        environment: of the command, by the run's folder.
    """

    forks: Forks
    words: tuple[Any, ...]
    home: Path
    environment: Callable[[Path], dict[str, str]] = lambda folder: {}

    def run(self, folder: Path, **kill: Any) -> Any:
        work, scratch = folder / "work", folder / "scratch"
        for place in (work, scratch):
            place.mkdir(parents=True, exist_ok=True)
        environment = {"TMPDIR": str(scratch), **self.environment(folder)}
        return self.forks.run(*self.words, cwd=work, watch=folder, environment=environment, **kill)

    def attack(self, kills: int, seed: int) -> int:
        """Kill the command so often, unless it ends first too often; return how often it died."""
        points = random.Random(seed)
        whole = self.home / "whole"
        undisturbed = self.run(whole)
        assert undisturbed.code == 0, undisturbed.errors
        assert undisturbed.steps > 0
        died = 0
        for number in range(4 * kills):
            if died == kills:
                break
            folder = self.home / "run"
            if number % 2 and undisturbed.steps > 1:
                kill = {"step": points.randint(1, undisturbed.steps)}
            else:
                kill = {"after": points.uniform(0.05, 1) * undisturbed.seconds}
            outcome = self.run(folder, **kill)
            assert outcome.code in (0, KILLED), outcome.errors
            died += outcome.code == KILLED
            before = visible(folder)
            for path in before:
                assert same(folder / path, whole / path), f"{path} after {kill}"
            identities = {path: identity(folder / path) for path in before if is_result(path)}
            done = (folder / "work" / "converted").exists()
            again = self.run(folder)
            assert again.code == (TARGET_EXISTS if done else 0), again.errors
            assert files_of(folder) == files_of(whole), kill
            for path in visible(folder):
                assert same(folder / path, whole / path), f"{path} resumed after {kill}"
            for path, old in identities.items():
                assert identity(folder / path) == old, f"{path} was made again after {kill}"
            shutil.rmtree(folder)
        return died


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock"}


def visible(folder: Path) -> list[str]:
    """Return the files that a person, or danqing, would take for whole ones."""
    return [
        path
        for path in files_of(folder)
        if (folder / path).is_file()
        and not any(part.startswith(".") for part in Path(path).parts)
        and not path.endswith(".incomplete")
        and not path.startswith("scratch/")
    ]


def is_result(path: str) -> bool:
    """Say whether a file, once it is there, must not be made again: images of an evaluation set."""
    return path.startswith("work/set/") and path.endswith(".png")


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def same(path: Path, whole: Path) -> bool:
    """Compare files but for times, which differ between runs."""
    if path.suffix == ".png":
        with Image.open(path) as one, Image.open(whole) as two:
            equal = np.array_equal(np.asarray(one), np.asarray(two))
        return equal and (read_record_or_none(path) is None) == (read_record_or_none(whole) is None)
    if path.suffix == ".trace":
        traces = read_trace(path), read_trace(whole)
        return all(
            np.array_equal(traces[0].read(name).bits, traces[1].read(name).bits)  # type: ignore[union-attr]
            for name in traces[1].joints
        )
    if path.name == "report.json":
        return len(read_report(path).cases) == len(read_report(whole).cases)
    if path.name.startswith("report."):
        return path.read_text("utf-8")[-20:] == whole.read_text("utf-8")[-20:]
    return path.read_bytes() == whole.read_bytes()


def read_record_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return read_record(path) or None
    except Exception:
        return None


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture
def victim(request: pytest.FixtureRequest, forks: Forks, schnell: Path, tmp_path: Path) -> Victim:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    words = tuple(schnell if word == "SOURCE" else word for word in COMMANDS[request.param])
    if request.param != "convert":
        words += ("-m", schnell)
    return Victim(forks, words, tmp_path)


@pytest.mark.parametrize(
    "victim",
    slow_among(COMMANDS, ("report", "convert")),
    indirect=True,
)
def test_killed_commands_resume(victim: Victim) -> None:
    assert victim.attack(QUICK, seed=1) == QUICK


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", COMMANDS, indirect=True)
def test_commands_killed_at_many_points_resume(victim: Victim) -> None:
    assert victim.attack(MANY, seed=2) == MANY


@pytest.mark.parametrize("victim", ["convert"], indirect=True)
def test_two_conversions_to_one_target(victim: Victim) -> None:
    """One of them writes it whole; the other says that it exists."""
    whole = victim.home / "whole"
    assert victim.run(whole).code == 0
    work = victim.home / "both"
    work.mkdir()
    outcomes = victim.forks.run_together(3, *victim.words, cwd=work)
    assert sorted(outcome.code for outcome in outcomes) == [0, TARGET_EXISTS, TARGET_EXISTS]
    assert files_of(work) == files_of(whole / "work")
    assert all(same(work / path, whole / "work" / path) for path in visible(work))


# --- pull ----------------------------------------------------------------------------------------


@pytest.fixture
def pulled(
    request: pytest.FixtureRequest, schnell: Path, tmp_path: Path
) -> Iterator[tuple[Victim, Hub]]:
    if request.param == "modelscope":
        pytest.importorskip("modelscope")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_"))}
    with Hub(schnell) as hub:
        environment = {
            **plain,
            "HF_ENDPOINT": hub.url,
            "MODELSCOPE_ENDPOINT": hub.url,
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }

        def caches(folder: Path) -> dict[str, str]:
            return {
                "HOME": str(folder / "home"),
                "XDG_CACHE_HOME": str(folder / "scratch"),
                "HF_HUB_CACHE": str(folder / "work" / "hub"),
                "MODELSCOPE_CACHE": str(folder / "work" / "scope"),
            }

        words = ("pull", "owner/toy", "--from", request.param, "-q")
        with Forks(tmp_path / "forks", environment) as forks:
            yield Victim(forks, words, tmp_path, caches), hub


@pytest.mark.enable_socket
@pytest.mark.parametrize(
    "pulled", slow_among(("huggingface", "modelscope"), ["modelscope"]), indirect=True
)
def test_killed_pulls_resume(pulled: tuple[Victim, Hub]) -> None:
    victim, hub = pulled
    hub.slow = 0.002
    assert victim.attack(QUICK, seed=1) == QUICK


@pytest.mark.enable_socket
@pytest.mark.parametrize("pulled", ["huggingface"], indirect=True)
def test_three_pulls_at_once(pulled: tuple[Victim, Hub]) -> None:
    """Each file is fetched once: who comes second waits."""
    victim, hub = pulled
    hub.slow = 0.002
    folder = victim.home / "together"
    folder.mkdir()
    outcomes = victim.forks.run_together(
        3, *victim.words, cwd=folder, environment=victim.environment(folder)
    )
    assert [outcome.code for outcome in outcomes] == [0] * 3, outcomes[0].errors
    big = "vae/diffusion_pytorch_model.safetensors"
    (found,) = (folder / "work" / "hub").rglob(big)
    assert found.read_bytes() == (hub.folder / big).read_bytes()
    assert hub.sent[big] < 1.5 * found.stat().st_size
    assert not list((folder / "work").rglob("*.incomplete"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.enable_socket
@pytest.mark.parametrize("pulled", ["huggingface", "modelscope"], indirect=True)
def test_pulls_killed_at_many_points_resume(pulled: tuple[Victim, Hub]) -> None:
    victim, hub = pulled
    hub.slow = 0.002
    assert victim.attack(MANY, seed=2) == MANY
