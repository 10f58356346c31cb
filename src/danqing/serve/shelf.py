"""Jobs that clients may ask for again, by id and by Idempotency-Key, and how they ended."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from danqing.errors import DanqingError, JournalBusyError, JournalError, RequestError
from danqing.serve.jobs import unknown_failure
from danqing.serve.logs import about

if TYPE_CHECKING:
    from collections.abc import Callable

    from danqing.serve.jobs import Job, State
    from danqing.serve.journal import Journal

log = logging.getLogger("danqing.serve")

KEPT_BYTES = 128 << 20
"""Of finished images that are kept in memory, so that they can be asked for again."""
KEPT_SECONDS = 3600.0
KEPT_JOBS = 256


@dataclass(eq=False)
class Reservation:
    """One Idempotency-Key of one client: the first request fills it, the others wait for it.

    Attributes:
        digest: of what the first request asks for.
        filled: set when the job or the error is known.
        job: that the first request became.
        error: that the first request met.
    """

    digest: str | None
    filled: threading.Event = field(default_factory=threading.Event)
    job: Job | None = None
    error: DanqingError | None = None

    def fill(self, job: Job) -> None:
        """Let the others have the job."""
        self.job = job
        self.filled.set()

    def fail(self, error: BaseException) -> None:
        """Let the others have the error."""
        self.error = error if isinstance(error, DanqingError) else unknown_failure()
        self.filled.set()

    def wait(self, job: Job, seconds: float) -> Job:
        """Return the job of the first request to another one that asks for the same.

        Raises:
            DanqingError: the first request's, or that it takes too long.
        """
        if self.job is None and self.digest != job.digest:
            raise _reused(job)
        if not self.filled.wait(seconds):
            raise JournalBusyError(
                "an earlier request with this Idempotency-Key is still being accepted",
                seen=job.idempotency,
                hint="ask again in a moment",
            )
        if self.error is not None:
            raise copy.copy(self.error)
        assert self.job is not None  # noqa: S101 - filled with a job or an error
        return _same_job(self.job, job)


class Shelf:
    """The jobs in memory, under the lock of their service, and ends not yet in the journal."""

    def __init__(self, lock: threading.Condition, journal: Journal | None) -> None:
        """Begin empty.

        Args:
            lock: reentrant, so that its owner can make several calls one.
            journal: where jobs are kept, too.
        """
        self._lock = lock
        self._journal = journal
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._reservations: dict[tuple[str, str], Reservation] = {}
        self._unwritten: list[tuple[Job, State, DanqingError | None]] = []

    @property
    def keys(self) -> frozenset[tuple[str, str]]:
        """Clients and their Idempotency-Keys that stand for a job, or soon will."""
        with self._lock:
            return frozenset(self._reservations)

    def find(self, name: str) -> Job | None:
        """Return a job by its id."""
        with self._lock:
            return self._jobs.get(name)

    def late(self, now: float) -> list[Job]:
        """Return the jobs that have not ended and whose deadline has passed."""
        with self._lock:
            jobs = [job for job in self._jobs.values() if not job.ended]
        return [job for job in jobs if job.expires is not None and job.expires < now]

    # --- Idempotency-Keys ----------------------------------------------------------------------

    def once(self, job: Job, accept: Callable[[], Job], patience: float) -> Job:
        """Accept a job under its Idempotency-Key, or return the job that has this key.

        Args:
            job: to be accepted.
            accept: accepts it; only the first of several requests calls it.
            patience: seconds that the others wait for the first.

        Raises:
            RequestError: the key stands for another request.
            DanqingError: the first request's, or that it takes too long.
        """
        name = _name(job)
        with self._lock:
            self._drop_old()
            first = name not in self._reservations
            reservation = self._reservations.setdefault(name, Reservation(job.digest))
        if not first:
            return reservation.wait(job, patience)
        try:
            known = accept()
        except BaseException as error:
            with self._lock:
                if self._reservations.get(name) is reservation:
                    del self._reservations[name]
            reservation.fail(error)
            raise
        reservation.fill(known)
        return _same_job(known, job)

    def remember(self, job: Job) -> None:
        """Keep a job, so that it can be asked for again."""
        with self._lock:
            self._drop_old()
            self._jobs[job.id] = job
            if job.idempotency is not None and _name(job) not in self._reservations:
                # else the request that reserved it fills it
                reservation = self._reservations[_name(job)] = Reservation(job.digest)
                reservation.fill(job)

    def forget(self, job: Job) -> None:
        """Keep a job no longer."""
        with self._lock:
            self._jobs.pop(job.id, None)
            if job.idempotency is not None:
                reservation = self._reservations.get(_name(job))
                if reservation is not None and reservation.job is job:
                    del self._reservations[_name(job)]

    def _drop_old(self) -> None:
        """Forget jobs that ended long ago, and the oldest if their images are too many bytes."""
        held = sum(job.size_bytes for job in self._jobs.values())
        unwritten = {job.id for job, _, _ in self._unwritten}
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if job.ended_at is None or job.id in unwritten:
                continue
            old = now - job.ended_at > KEPT_SECONDS
            if old or held > KEPT_BYTES or len(self._jobs) > KEPT_JOBS:
                held -= job.size_bytes
                self.forget(job)

    # --- ends ----------------------------------------------------------------------------------

    def write_end(self, job: Job, state: State, error: DanqingError | None) -> None:
        """Write how a job ends into the journal; if that fails, `write_again` tries later."""
        if self._journal is None or state == "given back":
            return
        try:
            self._journal.end(job, state, error)
        except Exception as problem:  # its client gets the answer
            log.exception("the journal lacks how a job ended", extra=about(job))
            if isinstance(problem, JournalError):
                self.write_later(job, state, error)

    def write_later(self, job: Job, state: State, error: DanqingError | None) -> None:
        """Let `write_again` write how a job ended."""
        with self._lock:
            self._unwritten.append((job, state, error))

    def write_again(self) -> None:
        """Write the ends of jobs that the journal could not take when they ended."""
        if self._journal is None:
            return
        with self._lock:
            unwritten, self._unwritten = self._unwritten, []
        for number, (job, state, error) in enumerate(unwritten):
            try:
                self._journal.end(job, state, error)
            except JournalError:
                with self._lock:
                    self._unwritten = unwritten[number:] + self._unwritten
                return


def _same_job(known: Job, job: Job) -> Job:
    """Return the job that an Idempotency-Key stands for.

    Raises:
        RequestError: it was asked for by another request.
    """
    if known is not job and not known.asks_the_same(job.digest or "", job.sent_digest):
        raise _reused(job)
    return known


def _name(job: Job) -> tuple[str, str]:
    return job.client, job.idempotency or ""


def _reused(job: Job) -> RequestError:
    return RequestError(
        "the Idempotency-Key was used for another request",
        seen=job.idempotency,
        setting="Idempotency-Key",
    )
