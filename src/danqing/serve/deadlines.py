"""Deadlines: a thread ends jobs that are late, and does what is due from time to time."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from danqing.serve.jobs import LATE_SECONDS, late_error

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from danqing.errors import DanqingError
    from danqing.serve.job_queue import JobQueue
    from danqing.serve.jobs import Job, State
    from danqing.serve.shelf import Shelf

log = logging.getLogger("danqing.serve")

LOOK_SECONDS = 0.5
"""Between two looks for late jobs."""


class Deadlines:
    """Keeps the deadlines of all jobs, as long as its thread runs."""

    def __init__(
        self,
        lock: threading.Condition,
        queue: JobQueue,
        shelf: Shelf,
        end: Callable[[Job, State, DanqingError], None],
    ) -> None:
        """Keep the parts.

        Args:
            lock: of queue and shelf; notified when the service closes.
            queue: jobs that wait.
            shelf: all jobs that have not ended.
            end: ends a job for those who wait for it.
        """
        self._lock = lock
        self._queue = queue
        self._shelf = shelf
        self._end = end
        self._tasks: list[tuple[float, Callable[[], None]]] = []

    def every(self, seconds: float, task: Callable[[], None]) -> None:
        """Do something again and again, too."""
        self._tasks.append((seconds, task))

    def run(self, closing: Callable[[], bool]) -> None:
        """Look until the service closes."""
        done = [time.monotonic()] * len(self._tasks)
        while True:
            with self._lock:
                if self._lock.wait_for(closing, timeout=LOOK_SECONDS):
                    return
            try:
                self._end_late()
                for number, (seconds, task) in enumerate(self._tasks):
                    if time.monotonic() - done[number] > seconds:
                        done[number] = time.monotonic()
                        task()
            except Exception:  # it must go on keeping the time
                log.exception("keeping deadlines failed")

    def _end_late(self) -> None:
        """End the jobs whose deadline has passed: waiting, running, and hanging in their end."""
        with self._lock:
            now = time.monotonic()
            late = self._shelf.late(now)
            self._queue.remove(*late)
        for job in late:
            job.given_up.set()
            if not job.claimed:
                self._end(job, "failed", late_error(job))
            elif job.expires is not None and job.expires + LATE_SECONDS < now:
                job.end_late()
