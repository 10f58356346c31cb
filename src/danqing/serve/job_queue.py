"""The queue: jobs that wait for a worker, and how many jobs each client has."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from typing import TYPE_CHECKING

from danqing.errors import BusyError
from danqing.serve.jobs import Moved

if TYPE_CHECKING:
    from danqing.serve.jobs import Job
    from danqing.serve.limits import Limits

_RECENT = 32
"""Jobs whose seconds are remembered, to say how long a client should wait."""


class JobQueue:
    """Jobs in the order of their arrival; its caller holds a lock."""

    def __init__(self, limits: Limits, workers: int) -> None:
        """Begin empty.

        Args:
            limits: of its length, and of one client.
            workers: that take jobs from it.
        """
        self._limits = limits
        self._workers = workers
        self._waiting: deque[Job] = deque()
        self._pending: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=_RECENT)

    def __len__(self) -> int:
        """Return the number of jobs that wait."""
        return len(self._waiting)

    def check_room(self, client: str) -> None:
        """See that one more job of a client fits.

        Raises:
            BusyError: the queue is full, or the client has too many jobs.
        """
        if len(self._waiting) >= self._limits.queue:
            raise BusyError(
                "the queue is full",
                seen=f"{len(self._waiting)} jobs wait",
                allowed=f"at most {self._limits.queue}",
                retry_after=self._estimate(len(self._waiting) // 4),
            )
        if self._pending[client] >= self._limits.per_client:
            raise BusyError(
                "too many jobs of this client",
                seen=f"{self._pending[client]} wait or run",
                allowed=f"at most {self._limits.per_client}",
                retry_after=self._estimate(1),
            )

    def _estimate(self, jobs: int) -> int:
        """Return the seconds that some jobs will take, in whole ones."""
        each = statistics.median(self._seconds) if self._seconds else 1.0
        return max(1, math.ceil(each * jobs / self._workers))

    def add_seconds(self, seconds: float) -> None:
        """Remember how long a job took."""
        self._seconds.append(seconds)

    def count(self, job: Job) -> None:
        """Count a job for its client, from acceptance to its end."""
        self._pending[job.client] += 1

    def uncount(self, job: Job) -> None:
        """Count a job no longer."""
        self._pending[job.client] -= 1
        if self._pending[job.client] <= 0:
            del self._pending[job.client]

    def append(self, job: Job) -> None:
        """Let a job wait behind all others."""
        self._waiting.append(job)
        job.position = len(self._waiting) - 1

    def take(self) -> Job:
        """Return the job that waited longest."""
        job = self._waiting.popleft()
        self._report_positions()
        return job

    def remove(self, *jobs: Job) -> bool:
        """Take jobs out; return False if none of them waited."""
        waiting = [job for job in jobs if job in self._waiting]
        for job in waiting:
            self._waiting.remove(job)
        self._report_positions()
        return bool(waiting)

    def clear(self) -> list[Job]:
        """Take all jobs out."""
        jobs = list(self._waiting)
        self._waiting.clear()
        return jobs

    def expire_at(self, expires: float) -> None:
        """Set the deadline of all jobs, by `time.monotonic`."""
        for job in self._waiting:
            job.expires = expires

    def _report_positions(self) -> None:
        for position, job in enumerate(self._waiting):
            if job.position != position:
                job.tell(Moved(position))
