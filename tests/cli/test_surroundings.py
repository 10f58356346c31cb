"""Homes, caches, users, clocks, masks and names that are odd: it works, or says why it does not."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from danqing import cache
from danqing.engine.conditions import KEPT, PromptCache
from danqing.plan import rates
from tests import toys
from tests.forks import Forks, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY, UNKNOWN = 65534, 54321
YEAR = 365 * 24 * 3600
TOY = ("--device", "cpu", "--size", "64x64", "--seed", 1, "-q")
DENIED, DAMAGED = 7, 3
root = pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser becomes another user")


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A folder that every user may read and write; pytest's own are private."""
    folder = Path(tempfile.mkdtemp(prefix="danqing-test-"))
    folder.chmod(0o777)
    toys.write_diffusers(folder / "model")
    for path in (folder / "model").rglob("*.*"):
        path.chmod(0o644)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def forks(public: Path) -> Iterator[Forks]:
    with Forks(public / "forks") as server:
        yield server


@pytest.fixture
def place(public: Path, request: pytest.FixtureRequest) -> Path:
    folder = public / f"{abs(hash(request.node.name))}"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def paint(forks: Forks, public: Path, *words: object, **surroundings: Any) -> Outcome:
    model = ("-m", public / "model", "--prompt-cache", public / "prompts")
    return forks.run("generate", "a cat", *model, *TOY, *words, **surroundings)


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def expected(forks: Forks, public: Path) -> Any:
    assert paint(forks, public, "-o", public / "expected.png").code == 0
    shutil.rmtree(public / "prompts")  # root's, which others cannot write
    for words in (
        ("trace", "a cat", "--out", public / "a.trace"),
        ("verify", "determinism", "a cat", "--no-process"),
        ("check", public / "model"),
    ):
        model = () if words[0] == "check" else ("-m", public / "model")
        assert forks.run(*words, *model).code == 0
    return pixels(public / "expected.png")


HOMES: dict[str, dict[str, Any]] = {
    "HOME is not set": {"environment": {"HOME": None}},
    "HOME is not set, and the user unknown": {"environment": {"HOME": None}, "uid": UNKNOWN},
    "HOME does not exist": {"environment": {"HOME": "/nonexistent/home"}, "uid": NOBODY},
    "HOME is read-only": {"environment": {"HOME": "/"}, "uid": NOBODY},
    "HOME is a file": {"environment": {"HOME": "/etc/passwd"}},
    "the cache is read-only": {"environment": {"XDG_CACHE_HOME": "/etc"}, "uid": NOBODY},
    "the cache is a file": {"environment": {"XDG_CACHE_HOME": "/etc/passwd"}},
    "the cache is on /proc": {"environment": {"XDG_CACHE_HOME": "/proc/self"}},
    "TMPDIR does not exist": {"environment": {"TMPDIR": "/nonexistent"}},
    "TMPDIR is read-only": {"environment": {"TMPDIR": "/etc"}, "uid": NOBODY},
    "another user": {"uid": NOBODY},
    "the clock is a year late": {"clock": -YEAR},
    "the clock is a year early": {"clock": YEAR},
    "the clock is at zero": {"clock": -time.time()},
    "umask 000": {"umask": 0},
    "umask 077": {"umask": 0o077},
}


@root
@pytest.mark.parametrize("kind", HOMES)
def test_the_image_is_the_same(
    kind: str, forks: Forks, public: Path, place: Path, expected: Any
) -> None:
    surroundings = HOMES[kind]
    environment = {"XDG_CACHE_HOME": None, **surroundings.get("environment", {})}
    if "HOME" not in environment:
        environment["HOME"] = str(place / "home")
        (place / "home").mkdir()
        (place / "home").chmod(0o777)
    rest = {name: value for name, value in surroundings.items() if name != "environment"}
    painted = paint(
        forks, place, "-m", public / "model", "-o", place / "out.png",
        environment=environment, **rest,
    )  # fmt: skip
    checked = forks.run("check", public / "model", environment=environment, **rest)
    for outcome in (painted, checked):
        assert outcome.code == 0, outcome.errors
        assert "Traceback" not in outcome.errors
    assert np.array_equal(pixels(place / "out.png"), expected)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_permissions_of_files(umask: int, forks: Forks, public: Path, place: Path) -> None:
    """Images are as open as the user's umask says; caches are private always."""
    environment = {"XDG_CACHE_HOME": str(place / "cache")}
    options: dict[str, Any] = {"umask": umask, "environment": environment}
    words = ("-m", public / "model", "--prompt-cache", place / "prompts")
    outcome = paint(forks, public, *words, "-o", place / "out.png", **options)
    assert outcome.code == 0, outcome.errors
    target = place / "converted"
    converted = forks.run("convert", public / "model", target, "--layout", "bfl", **options)
    assert converted.code == 0, converted.errors
    found = modes(place)
    assert found["out.png"] == 0o666 & ~umask
    assert found["converted"] == 0o777 & ~umask
    assert found["ae.safetensors"] == 0o666 & ~umask
    for path in (place / "prompts").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = os.umask(umask)
    try:
        cache_home = place / "fresh"
        os.environ["XDG_CACHE_HOME"], old = str(cache_home), os.environ.get("XDG_CACHE_HOME", "")
        cache.add_to_table(cache.cache_folder() / "table.json", "key", 1)
    finally:
        os.umask(before)
        os.environ["XDG_CACHE_HOME"] = old
    assert modes(cache_home)["danqing"] == 0o700
    assert modes(cache_home)["table.json"] == 0o600


@root
def test_a_folder_that_may_not_be_written(
    forks: Forks, public: Path, place: Path, expected: Any
) -> None:
    place.chmod(0o555)
    model = ("-m", public / "model")
    for words in (
        ("generate", "a cat", *model, *TOY),
        ("generate", "a cat", *model, *TOY, "-o", "new/out.png"),
        ("trace", "a cat", *model, "--out", "a.trace"),
        ("convert", public / "model", "converted", "--layout", "bfl"),
        ("report", "a cat", *model, "--out", "report", "--require", "any"),
    ):
        outcome = forks.run(*words, cwd=place, uid=NOBODY)
        assert outcome.code == DENIED, (words, outcome.errors)
        assert "Traceback" not in outcome.errors
        assert "bug" not in outcome.errors
    assert list(place.iterdir()) == []


@root
def test_no_place_for_temporary_files(forks: Forks, public: Path, expected: Any) -> None:
    """Python falls back on the current folder; where that is closed too, the error says so."""
    environment = {"TMPDIR": "/etc"}
    closed = public / "closed"
    closed.mkdir(mode=0o555)
    words = ("verify", "determinism", "a cat", "-m", public / "model", "--no-process")
    outcome = forks.run(*words, cwd=closed, uid=NOBODY, environment=environment, no_tmp=True)
    assert outcome.code == DENIED, outcome.errors
    assert "TMPDIR" in outcome.errors


NAMES = {
    "a space": "a b.png",
    "Chinese": "丹青.png",
    "a leading dash": "./-rf.png",
    "a newline": "a\nb.png",
    "an escape": "a\x1b]0;title\x07.png",
    "not UTF-8": os.fsdecode(b"\xff\xfe.png"),
    "bidirectional": "a\u202egnp.png",
    "of 255 bytes": "x" * 251 + ".png",
    "a quote": 'it\'s "one".png',
    "a dollar": "$HOME`id`.png",
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_files(kind: str, forks: Forks, public: Path, place: Path, expected: Any) -> None:
    outcome = paint(forks, place, "-m", public / "model", "-o", NAMES[kind], cwd=place)
    assert outcome.code == 0, outcome.errors
    assert np.array_equal(pixels(place / NAMES[kind]), expected)
    assert "\x1b" not in outcome.errors
    shown = forks.run("show", NAMES[kind], cwd=place)
    assert shown.code == 0, shown.errors


@pytest.mark.parametrize("name", ["x" * 252 + ".png", "~nobody-of-this-name/out.png"])
def test_names_that_cannot_be(name: str, forks: Forks, public: Path, place: Path) -> None:
    outcome = paint(forks, place, "-m", public / "model", "-o", name, cwd=place)
    assert outcome.code in (0, 2, DENIED), outcome.errors
    assert "bug" not in outcome.errors


@pytest.mark.slow
def test_a_plain_locale(public: Path, place: Path) -> None:
    """As in cron jobs and small containers."""
    environment = {**os.environ, "LC_ALL": "C", "XDG_CACHE_HOME": str(place)}
    child = subprocess.run(
        [
            sys.executable, "-m", "danqing", "generate", "丹青", "-m", str(public / "model"),
            "-o", "丹青.png", *map(str, TOY),
        ],
        cwd=place, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert Image.open(place / "丹青.png").size == (64, 64)


FOLDERS = {
    "not UTF-8": os.fsdecode(b"\xff\xfe m"),
    "Chinese": "模型 一",
    "controls": "a\n\x1b]0;title\x07",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_every_command_in_an_oddly_named_folder(
    kind: str, forks: Forks, public: Path, place: Path
) -> None:
    """The folder of the weights, of the prompts and of whatever is written.

    The safetensors library opens no paths that are not UTF-8: such weights are an error.
    """
    home = place / FOLDERS[kind]
    home.mkdir()
    weights = home / "model"
    weights.symlink_to(public / "model")
    if kind == "not UTF-8":
        refused = forks.run("generate", "a cat", "-m", weights, "-o", home / "a.png", "-q")
        assert refused.code == DAMAGED, refused.errors
        weights = public / "model"
    (home / "rows.jsonl").write_text('{"prompt": "a cat", "include": []}\n')
    model = ("-m", weights, "--device", "cpu", "-q", "--steps", 1)
    small = ("--height", 64, "--width", 64, "--seed", 1)
    brief = (
        "--repeats", 1, "--batch", 0, "--no-cost", "--no-process", "--no-switches",
        "--require", "any",
    )  # fmt: skip
    for words in (
        ("generate", "a cat", *model, *small, "-o", home / "a.png", "--prompt-cache", home / "p"),
        ("generate", "--from", home / "a.png", "--trust", "-o", home / "b.png", "-q"),
        ("show", home / "a.png"),
        ("trace", "a cat", *model, *small, "--out", home / "a.trace"),
        ("verify", "traces", home / "a.trace", home / "a.trace"),
        ("eval-set", "geneval", "--prompts", home / "rows.jsonl", "--out", home / "set", *model,
         *small),
        ("report", "a cat", "--out", home / "report", *brief, *model, *small),
        ("report", "--views", home / "report" / "report.json"),
        ("check", weights),
        ("convert", weights, home / "converted", "--layout", "bfl", "-q"),
        ("check", home / "converted"),
    ):  # fmt: skip
        outcome = forks.run(*words)
        assert outcome.code == 0, (words, outcome.errors)
        assert "\x1b" not in outcome.errors
    assert np.array_equal(pixels(home / "a.png"), pixels(home / "b.png"))


# --- what is kept between runs -------------------------------------------------------------------


ADD = """
import sys
from pathlib import Path
from danqing.cache import add_to_table
for row in range(25):
    add_to_table(Path(sys.argv[1]), f"{sys.argv[2]} {row}", row)
"""


def test_rows_of_simultaneous_writers_are_all_kept(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    children = [
        subprocess.Popen([sys.executable, "-c", ADD, str(table), str(number)])
        for number in range(6)
    ]
    assert [child.wait() for child in children] == [0] * 6
    assert len(json.loads(table.read_text())) == 6 * 25
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_stopped_holder_of_the_lock_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from danqing.atomic import lock

    monkeypatch.setattr(cache, "_LOCK_SECONDS", 0.1)
    table = tmp_path / "table.json"
    cache.add_to_table(table, "a", 1)
    with lock(tmp_path, seconds=1):
        start = time.monotonic()
        cache.add_to_table(table, "b", 2)
        assert time.monotonic() - start < 1
    cache.add_to_table(table, "c", 3)
    assert cache.read_table(table) == {"a": 1, "c": 3}


@pytest.mark.parametrize("damage", [b"", b"[" * 100_000, b"\xff", b"[1]", b'{"a": 1'])
def test_a_damaged_table_is_begun_anew(damage: bytes, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_bytes(damage)
    assert cache.read_table(table) == {}
    cache.add_to_table(table, "key", 1)
    assert cache.read_table(table) == {"key": 1}


@pytest.mark.parametrize("jump", [-YEAR, YEAR])
def test_rates_measured_by_a_wrong_clock_are_measured_again(
    jump: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from danqing.devices import select

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    value = rates.Rates(matmul_flops=1.0, conv_flops=1.0, read_bytes=1.0, fill_bytes=1.0)
    counted: list[int] = []

    def measure(*_: object) -> rates.Rates:
        counted.append(1)
        return value

    monkeypatch.setattr(rates, "_measure", measure)
    now = time.time()
    weights = tmp_path / "weights"
    weights.write_bytes(b"x")
    device = select("cpu").device
    monkeypatch.setattr(time, "time", lambda: now + jump)
    rates.measured(device, "float32", weights)
    monkeypatch.setattr(time, "time", lambda: now)
    rates.measured(device, "float32", weights)
    rates.measured(device, "float32", weights)
    assert len(counted) == 2


def test_prompts_kept_by_a_wrong_clock_go_first(tmp_path: Path) -> None:
    """Entries dated in the future must not push out the one that was just made."""
    from types import SimpleNamespace

    import torch

    for number in range(KEPT):
        path = tmp_path / f"{number}.conditioning.safetensors"
        path.write_bytes(b"")
        os.utime(path, (time.time() + YEAR, time.time() + YEAR))
    PromptCache(tmp_path, {}).keep(SimpleNamespace(embeds=torch.zeros(1)), (), {"prompt": "new"})
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == KEPT
    assert any(len(name) > 64 for name in names)


# --- first starts --------------------------------------------------------------------------------


def first_starts(forks: Forks, public: Path, place: Path, count: int) -> None:
    environment = {"XDG_CACHE_HOME": str(place / "cache")}
    outcomes = forks.run_together(
        count, "generate", "a cat", "-m", public / "model", *TOY, "--dtype", "bfloat16",
        "--placement", "streamed", "--prompt-cache", place / "prompts", "-o", place / "{n}.png",
        environment=environment,
    )  # fmt: skip
    assert [outcome.code for outcome in outcomes] == [0] * count, outcomes[0].errors
    first = pixels(place / "0.png")
    assert all(np.array_equal(pixels(place / f"{n}.png"), first) for n in range(count))
    left = [path for path in place.rglob("*") if path.name.endswith(".part")]
    assert left == []
    for table in (place / "cache").rglob("*.json"):
        json.loads(table.read_text())


def test_three_first_starts_at_once(forks: Forks, public: Path, place: Path) -> None:
    first_starts(forks, public, place, 3)


@pytest.mark.slow
def test_twenty_first_starts_at_once(forks: Forks, public: Path, place: Path) -> None:
    first_starts(forks, public, place, 20)
