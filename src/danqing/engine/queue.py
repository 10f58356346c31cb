"""Turns on a device: one request at a time, for all engines of this process."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from danqing.errors import BusyError
from danqing.generation import Progress
from danqing.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from danqing.runner import Listener

_TURNS: dict[str, Turns] = {}
"""By device, for all engines of this process: two that share a device take turns, too."""


class DeviceQueue:
    """The queue in front of an engine's devices."""

    def __init__(self, names: Iterable[str]) -> None:
        """Name the devices; all threads take them in one order, so that none waits in a circle."""
        self._names = sorted(set(names))
        self._busy = False

    @contextlib.contextmanager
    def hold(self, listen: Listener | None) -> Iterator[None]:
        """Hold all devices; a listener hears how many are ahead, and cancels by raising."""
        with contextlib.ExitStack() as held:
            for name in self._names:
                turns = _TURNS.setdefault(name, Turns())
                waiting = None if listen is None else _WaitReport(name, listen)
                held.enter_context(turns.take(waiting))
            yield

    @contextlib.contextmanager
    def work(self, listen: Listener | None) -> Iterator[None]:
        """Hold all devices to compute.

        Raises:
            BusyError: this very thread is computing: a listener or a probe called the engine.
        """
        with self.hold(listen):
            if self._busy:
                raise BusyError(
                    "the engine is generating an image in this thread",
                    seen="a call from its own listener or probe",
                    hint="call it when generate has returned, or open a second engine",
                )
            self._busy = True
            try:
                yield
            finally:
                self._busy = False


def is_taken(name: str) -> bool:
    """Return whether a thread of this process holds a device."""
    return (turns := _TURNS.get(name)) is not None and turns.taken


class _WaitReport:
    """Reports to a listener how many requests are ahead."""

    def __init__(self, device: str, listen: Listener) -> None:
        self._device = device
        self._listen = listen
        self._start = time.perf_counter()
        self._most = 0

    def __call__(self, ahead: int) -> None:
        self._most = max(self._most, ahead)
        self._listen(
            Progress(
                stage="wait",
                item=self._device,
                done=self._most - ahead,
                total=self._most,
                unit="requests",
                seconds=time.perf_counter() - self._start,
            )
        )
