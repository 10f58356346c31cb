"""Runs targets in a process that is watched, and keeps inputs that reach new lines."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuzz.mutation import MAX_BYTES, mutate

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

HERE = Path(__file__).parent
CASE_SECONDS = 10.0
CASE_BYTES = 1 << 30
_POLL_SECONDS = 0.1
BLOCKED_SECONDS = 60.0
_HEAD = struct.Struct("<ddQQQ")
"""When the case began, seconds computed by then, its number, its length, the process's bytes."""
_FEW, _SLOW_SECONDS, _UNTRACED = 3, 0.05, 0.8
_MOST_KEPT = 2000
_FOUND = 70
_PAGE = os.sysconf("SC_PAGE_SIZE")


class FindingError(AssertionError):
    """A target saw an answer that it must not give."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One entry point.

    Attributes:
        name: on the command line, and of its folders.
        run: called with the input, and with a folder of its own to write into.
        kind: of its inputs; see `mutation.mutate`.
        allowed: exceptions that are documented for it.
        warm: run a case before the first fork, so that libraries are imported once.
    """

    name: str
    run: Callable[[bytes, Path], None]
    kind: str = "bytes"
    allowed: tuple[type[Exception], ...] = ()
    warm: bool = True

    def inputs(self, folder: str = "corpus") -> list[Path]:
        """Return the inputs in one of its folders."""
        place = HERE / folder / self.name
        return sorted(place.iterdir()) if place.is_dir() else []


@dataclass
class Result:
    """What came of a target's cases.

    Attributes:
        cases: how many ran.
        findings: what was wrong, with the file of its input.
    """

    cases: int = 0
    findings: list[tuple[str, Path]] = field(default_factory=list)


def run_case(target: Target, data: bytes, folder: Path) -> None:
    """Run one case; documented errors are swallowed.

    Raises:
        Exception: anything else, which is a finding.
    """
    from danqing.errors import DanqingError

    with contextlib.suppress(DanqingError, *target.allowed):
        target.run(data, folder)


def fuzz(target: Target, *, seconds: float, seed: int) -> Result:
    """Fuzz a target; a process that dies or hangs is replaced."""
    if target.warm:
        _warm(target)
    result = Result()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        shared = mmap.mmap(-1, _HEAD.size + MAX_BYTES)
        child = os.fork()
        if child == 0:
            _work(target, shared, seed + result.cases, end)
        why = _watch(child, shared, end)
        _, _, number, length, _ = _HEAD.unpack_from(shared)
        result.cases += number
        if why is not None:
            data = shared[_HEAD.size : _HEAD.size + length]
            if why.startswith("over") and (why := confirm(target, data)) is None:
                continue  # it was the tracing, or the machine was busy
            finding = (why, _save(target, data, "findings"))
            if finding not in result.findings:
                result.findings.append(finding)
    return result


def _warm(target: Target) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):
        run_case(target, target.inputs()[0].read_bytes(), Path(folder))


def confirm(target: Target, data: bytes) -> str | None:
    """Run one case by itself, without tracing; return what is wrong, or None."""
    shared = mmap.mmap(-1, _HEAD.size + MAX_BYTES)
    child = os.fork()
    if child == 0:
        code = 0
        folder = Path(tempfile.mkdtemp(prefix="danqing-fuzz-", dir=_memory()))
        try:
            _begin(shared, 1, len(data))
            run_case(target, data, folder)
        except BaseException:  # noqa: BLE001 - anything is a finding
            traceback.print_exc()
            code = _FOUND
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            sys.stderr.flush()
            os._exit(code)
    return _watch(child, shared, time.monotonic() + BLOCKED_SECONDS)


def _watch(child: int, shared: mmap.mmap, end: float) -> str | None:
    """Wait for the worker; return what was wrong, or None."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code in (0, _FOUND):
                return None if code == 0 else "an exception, printed above"
            return f"the process ended with {code}"
        began, used, _, _, before = _HEAD.unpack_from(shared)
        why = None
        if began and _processor_seconds(child) - used > CASE_SECONDS:
            why = f"over {CASE_SECONDS:.0f} seconds"
        elif began and time.monotonic() - began > BLOCKED_SECONDS:
            why = f"over {BLOCKED_SECONDS:.0f} seconds, most of them waiting"
        elif began and _resident(child) - before > CASE_BYTES:
            why = f"over {CASE_BYTES >> 20} MiB"
        elif time.monotonic() > end + BLOCKED_SECONDS:
            why = "it did not end"
        if why is not None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return why
        time.sleep(_POLL_SECONDS)


def _work(target: Target, shared: mmap.mmap, seed: int, end: float) -> None:
    """Run cases until the time is up; never returns."""
    dice = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="danqing-fuzz-", dir=_memory()))
    code = 0
    try:
        pool = [path.read_bytes() for path in [*target.inputs(), *target.inputs("kept")]] or [b""]
        lines = _Lines()
        number = 0
        start = time.monotonic()
        while time.monotonic() < end:
            fresh = number < len(pool) and seed % 2 == 0
            data = pool[number] if fresh else mutate(dice.choice(pool), target.kind, dice, pool)
            number += 1
            shared[_HEAD.size : _HEAD.size + len(data)] = data
            _begin(shared, number, len(data))
            # tracing slows large libraries down tenfold, so slow targets are traced now and then
            slow = number > _FEW and (time.monotonic() - start) / number > _SLOW_SECONDS
            traced = not slow or dice.random() > _UNTRACED
            with lines if traced else contextlib.nullcontext():
                run_case(target, data, folder)
            if traced and lines.grew() and len(pool) < _MOST_KEPT:
                pool.append(data)
                _save(target, data, "kept")
    except BaseException:  # noqa: BLE001 - anything is a finding
        traceback.print_exc()
        code = _FOUND
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        sys.stderr.flush()
        os._exit(code)


class _Lines:
    """Notes which lines of danqing run; a context manager."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()
        self._before = 0
        self._codes: dict[int, bool] = {}

    def __enter__(self) -> None:
        self._before = len(self._seen)
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def grew(self) -> bool:
        """Say whether the last case ran a line that none had run before."""
        return len(self._seen) > self._before

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG002
        code = frame.f_code
        known = self._codes.get(id(code))
        if known is None:
            known = self._codes[id(code)] = f"{os.sep}danqing{os.sep}" in code.co_filename
        return self._line if known else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG002
        if event == "line":
            self._seen.add((id(frame.f_code), frame.f_lineno))
        return self._line


def run_atheris(target: Target, *, seconds: int, seed: int) -> None:
    """Hand a target to libFuzzer; never returns."""
    import atheris

    folder = Path(tempfile.mkdtemp(prefix="danqing-fuzz-", dir=_memory()))
    kept = HERE / "kept" / target.name
    kept.mkdir(parents=True, exist_ok=True)
    findings = HERE / "findings" / target.name
    findings.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["danqing"]):
        _warm(target)  # which imports what it needs
    atheris.Setup(
        [
            "fuzz", str(kept), str(HERE / "corpus" / target.name), f"-max_total_time={seconds}",
            f"-seed={seed or 1}", f"-timeout={CASE_SECONDS:.0f}", "-rss_limit_mb=4096",
            f"-artifact_prefix={findings}/", f"-max_len={MAX_BYTES}",
        ],
        lambda data: run_case(target, data, folder),
    )  # fmt: skip
    atheris.Fuzz()


def _begin(shared: mmap.mmap, number: int, length: int) -> None:
    me = os.getpid()
    _HEAD.pack_into(
        shared, 0, time.monotonic(), _processor_seconds(me), number, length, _resident(me)
    )


def _processor_seconds(process: int) -> float:
    """Return what a process has computed: a busy machine must not look like a hang."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0.0
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_bytes().split()[1]) * _PAGE
    except OSError:
        return 0


def _memory() -> str | None:
    """Return a folder in memory, where there is one: each case writes a file."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108


def _save(target: Target, data: bytes, folder: str) -> Path:
    place = HERE / folder / target.name
    place.mkdir(parents=True, exist_ok=True)
    path = place / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path
