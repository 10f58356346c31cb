"""Turns: one thread at a time, in order of arrival."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEARTBEAT_SECONDS = 0.2
"""Between two calls of a waiting thread's listener, so that it can cancel while it waits."""

LAZY_IMPORTS = threading.RLock()
"""Held where classes of diffusers and transformers are imported: their lazy modules fail now and
then when several threads import at once ("cannot import name ...", diffusers 0.42.1)."""


class Turns:
    """A lock that is granted in order of arrival, and again to the thread that holds it."""

    def __init__(self) -> None:
        """Begin with nobody in the queue."""
        self._change = threading.Condition()
        self._queue: deque[object] = deque()
        self._owner: int | None = None

    @property
    def taken(self) -> bool:
        """Whether a thread holds it now."""
        return self._owner is not None

    @contextlib.contextmanager
    def take(self, waiting: Callable[[int], None] | None = None) -> Iterator[None]:
        """Hold the lock inside the context.

        Args:
            waiting: called while others are ahead, with their number: at once, and every
                `HEARTBEAT_SECONDS`. An exception it raises leaves the queue.
        """
        if self._owner == threading.get_ident():
            yield
            return
        ticket = object()
        try:
            with self._change:
                self._queue.append(ticket)
            self._wait(ticket, waiting)
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None
        finally:
            with self._change:
                # an interrupt may come before the ticket is in the queue
                if ticket in self._queue:
                    self._queue.remove(ticket)
                self._change.notify_all()

    def _wait(self, ticket: object, waiting: Callable[[int], None] | None) -> None:
        while True:
            with self._change:
                if self._queue[0] is ticket:
                    return
                ahead = self._queue.index(ticket)
                if waiting is None:
                    self._change.wait()
                    continue
            waiting(ahead)  # not under the lock: it may take its time, or raise
            with self._change:
                if self._queue[0] is not ticket and self._queue.index(ticket) == ahead:
                    self._change.wait(HEARTBEAT_SECONDS)
