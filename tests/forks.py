"""Runs danqing's commands in forked processes that can be killed at a chosen point.

Importing torch takes seconds, so one process imports everything and forks for each command:

    python -m tests.forks < commands
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

LIMIT_SECONDS = 100.0
KILLED = -signal.SIGKILL
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = {
    "open", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir",
    "os.truncate", "os.chmod",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one command.

    Attributes:
        code: its exit code, negative for a signal.
        output: on standard output.
        errors: on standard error.
        seconds: it ran.
        steps: changes of files under the watched folder: made, renamed, linked, removed.
    """

    code: int
    output: str
    errors: str
    seconds: float
    steps: int


class Forks:
    """A process that has imported everything; a context manager."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._environment = dict(os.environ if environment is None else environment)

    def __enter__(self) -> Self:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**self._environment, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()

    def run(
        self,
        *words: object,
        environment: Mapping[str, str | None] = {},
        after: float | None = None,
        step: int | None = None,
        watch: Path | None = None,
        **surroundings: Any,
    ) -> Outcome:
        """Run a command, and wait for it."""
        return self.run_together(
            1, *words, environment=environment, after=after, step=step, watch=watch, **surroundings
        )[0]

    def run_together(
        self,
        count: int,
        *words: object,
        environment: Mapping[str, str | None] = {},
        after: float | None = None,
        step: int | None = None,
        watch: Path | None = None,
        **surroundings: Any,
    ) -> list[Outcome]:
        """Run a command several times at once.

        Args:
            count: how often.
            words: of the command line; `{n}` in a word is the number of the process.
            environment: variables to set, or with None to remove.
            after: kill it after so many seconds.
            step: kill it before this change of a file under the watched folder, counted from 1.
            watch: that folder.
            surroundings: `cwd`, `uid`, `umask`, `clock` (seconds to be off by), `no_tmp` (neither /tmp nor
                its like).
        """
        job = {
            "count": count,
            "words": list(map(str, words)),
            "environment": dict(environment),
            "after": after,
            "step": step,
            "watch": None if watch is None else str(watch),
            **{name: str(v) if name == "cwd" else v for name, v in surroundings.items()},
        }
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(job) + "\n")
        self._child.stdin.flush()
        return [Outcome(**row) for row in json.loads(self._child.stdout.readline())]


def main(folder: Path) -> None:
    """Read jobs from standard input; answer each on standard output."""
    import diffusers
    import torch
    import transformers

    with contextlib.suppress(ImportError):
        importlib.import_module("modelscope.hub.snapshot_download")
    for kind in (  # both libraries import a class when it is asked for
        "FluxTransformer2DModel", "AutoencoderKL", "FlowMatchEulerDiscreteScheduler",
    ):  # fmt: skip
        getattr(diffusers, kind)
    for kind in ("CLIPTextModel", "CLIPTokenizer", "T5EncoderModel", "T5TokenizerFast"):
        getattr(transformers, kind)
    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(json.loads(line), folder)) + "\n")
        sys.stdout.flush()
        _learn(folder)


def _learn(folder: Path) -> None:
    """Import what the last command imported: another user may not read Python's own folder."""
    for name in (folder / "0" / "modules").read_text("utf-8").split():
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _run(job: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    start = time.monotonic()
    children = []
    for number in range(job["count"]):
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        (place / "steps").write_bytes(b"")
        (place / "modules").write_bytes(b"")
        if (child := os.fork()) == 0:
            words = [word.replace("{n}", str(number)) for word in job["words"]]
            _become({**job, "words": words}, place)
        children.append((child, place))
    return [_wait(child, place, start, job["after"]) for child, place in children]


def _wait(child: int, place: Path, start: float, after: float | None) -> dict[str, Any]:
    handle = os.pidfd_open(child)
    limit = LIMIT_SECONDS if after is None else after
    if not select.select([handle], [], [], limit)[0]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(handle)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "output": (place / "output").read_text("utf-8", "replace"),
        "errors": (place / "errors").read_text("utf-8", "replace"),
        "seconds": time.monotonic() - start,
        "steps": (place / "steps").stat().st_size,
    }


def _become(job: Mapping[str, Any], place: Path) -> None:
    """Turn this fork into the command; never returns."""
    code = 99
    try:
        for number, name in ((1, "output"), (2, "errors")):
            handle = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(handle, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
        _surround(job)
        if job["watch"] is not None:
            _count(job["watch"], job["step"], os.open(place / "steps", os.O_WRONLY | os.O_APPEND))
        sys.argv = ["danqing", *job["words"]]
        import danqing.cli

        danqing.cli.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            (place / "modules").write_text("\n".join(sys.modules), "utf-8")
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _surround(job: Mapping[str, Any]) -> None:
    for name, value in job["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    import tempfile

    tempfile.tempdir = None
    if "no_tmp" in job:
        tempfile._candidate_tempdir_list = lambda: [os.environ["TMPDIR"], os.getcwd()]  # type: ignore[attr-defined]  # noqa: PTH109
    if "cwd" in job:
        os.chdir(job["cwd"])
    if "umask" in job:
        os.umask(job["umask"])
    if "clock" in job:
        now, off = time.time, job["clock"]
        time.time = lambda: now() + off
    if "uid" in job:
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])


def _count(watch: str, last: int | None, tally: int) -> None:
    """Count changes of files under a folder; be killed before a certain one."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not (len(arguments) > 2 and (arguments[2] or 0) & _WRITES):
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(watch):  # noqa: PTH100
            return
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(tally, b".")

    sys.addaudithook(hook)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
