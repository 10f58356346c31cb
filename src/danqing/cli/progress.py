"""Progress on standard error: bars on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from danqing.cli import terminal
from danqing.escaping import escape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from danqing.generation import Progress
    from danqing.runner import Listener

PLAIN_SECONDS = 1.0
"""Between two plain lines of the same item; its end is always shown."""
_MIB = 2**20


@contextlib.contextmanager
def make_listener(*, quiet: bool) -> Iterator[Listener | None]:
    """Yield a listener that shows progress, or None."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        listener = _BarListener()
        try:
            yield listener
        finally:
            listener.stop()
    else:
        yield _PlainListener()


def describe(progress: Progress) -> str:
    """Return one report in words: amount, rate, time left."""
    rate = progress.seconds / progress.done if progress.done else 0.0
    left = rate * (progress.total - progress.done)
    if progress.unit == "bytes":
        amount = f"{progress.done / _MIB:.1f} of {progress.total / _MIB:.1f} MiB"
        return f"{progress.stage} {progress.item}: {amount}, {progress.seconds:.1f} s"
    if progress.unit == "requests":
        return f"wait for {progress.item}: {progress.total - progress.done} requests ahead"
    amount = f"step {progress.done} of {progress.total}"
    return f"{progress.stage} {progress.item}: {amount}, {rate:.3f} s/step, {left:.1f} s left"


class _PlainListener:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.done < progress.total and now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        print(describe(progress), file=sys.stderr, flush=True)


class _BarListener:
    """Shows a bar while an item is under way, and only then: between items the terminal is free."""

    def __init__(self) -> None:
        self._item: tuple[str, str] | None = None
        self._bars: Bars | None = None
        self._task: TaskID | None = None

    def __call__(self, progress: Progress) -> None:
        item = (progress.stage, progress.item)
        if self._bars is None or self._task is None or item != self._item:
            self.stop()
            self._item = item
            self._bars = _bars(transient=progress.stage == "denoise")
            title = escape(" ".join(item), one_line=True)
            self._task = self._bars.add_task(title, total=progress.total, text="")
            self._bars.start()
        text = describe(progress).partition(": ")[2]
        text = escape(text, one_line=True)
        self._bars.update(self._task, completed=progress.done, text=text)
        if progress.done >= progress.total:
            self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = self._item = None


def _bars(*, transient: bool) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(file=terminal.raw(sys.stderr)),
        transient=transient,
        redirect_stdout=False,  # the records on standard output may go into a file
        redirect_stderr=False,  # rich would print it past the stream that escapes it
    )
