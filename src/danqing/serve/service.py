"""The service: a bounded queue of jobs, and for each device a worker that paints them."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Literal

from danqing.errors import (
    ClosingError,
    DanqingError,
    ModelNotFoundError,
    RequestError,
)
from danqing.serve.deadlines import Deadlines
from danqing.serve.job_queue import JobQueue
from danqing.serve.jobs import Job, cancelled_error, late_error, unknown_failure
from danqing.serve.limits import Limits
from danqing.serve.logs import about
from danqing.serve.metrics import Gauges
from danqing.serve.shelf import Shelf

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from danqing.generation import Progress
    from danqing.runner import Runner, Spec
    from danqing.serve.jobs import Order, State
    from danqing.serve.journal import Journal
    from danqing.serve.metrics import Metrics
    from danqing.serve.worker import Checker, Worker

log = logging.getLogger("danqing.serve")

RESERVED_SECONDS = 10.0
"""How long a request waits for an earlier one with its Idempotency-Key to be accepted."""
STOP_SECONDS = 5.0
"""After the grace at shutdown, how long a running job may take to notice that it was given up."""
HANGING_SECONDS = 60.0
"""After that, how long shutdown waits for a device that computes before it leaves it alone."""
REWRITE_SECONDS = 5.0
"""Between two attempts to write ends of jobs that the journal could not take."""
TIDY_SECONDS = 600.0
"""Between two deletions of old jobs from the journal."""


class Service:
    """Takes jobs, lets workers paint them, and remembers what became of them."""

    def __init__(
        self,
        workers: Sequence[Worker],
        specs: Mapping[str, Spec],
        *,
        limits: Limits | None = None,
        journal: Journal | None = None,
        metrics: Metrics | None = None,
        checker: Checker | None = None,
    ) -> None:
        """Keep the parts; nothing is loaded yet.

        Args:
            workers: all with the same models.
            specs: what these models take, by name.
            limits: what is taken on.
            journal: where jobs are kept.
            metrics: that are counted.
            checker: of finished images.
        """
        self.specs = dict(specs)
        self.workers = tuple(workers)
        self.limits = limits or Limits()
        self.journal = journal
        self.checker = checker
        self.metrics = metrics
        self.state: Literal["starting", "ready", "closing"] = "starting"
        self._change = threading.Condition()
        self._queue = JobQueue(self.limits, len(self.workers))
        self.shelf = Shelf(self._change, journal)
        # daemons: a device that hangs must not keep the process from ending
        self._threads = [
            threading.Thread(
                target=self._work, args=(one,), name=f"danqing-{one.name}", daemon=True
            )
            for one in self.workers
        ]
        self._threads.append(
            threading.Thread(target=self._keep_time, name="danqing-deadlines", daemon=True)
        )

    # --- beginning and end ---------------------------------------------------------------------

    def load(self, listen: Callable[[str, Progress], None] = lambda _, __: None) -> None:
        """Load all models; then let the workers work, first on what the journal kept."""

        def heard(model: str, progress: Progress) -> None:
            if self.state == "closing":
                raise _closing()
            listen(model, progress)

        # before a client can ask for one of them
        for job in [] if self.journal is None else self.journal.resume():
            self._take_up(job)
        for worker in self.workers:
            worker.load(heard)
        with self._change:
            self._queue.expire_at(time.monotonic() + self.limits.deadline)
            if self.state == "starting":
                self.state = "ready"
        for thread in self._threads:
            thread.start()

    def _take_up(self, job: Job) -> Job:
        """Queue a job that only the journal knows, and return it, or the one that is queued."""
        with self._change:
            known = self.shelf.find(job.id)
            if known is not None:
                return known
            if self.state == "closing":
                raise _closing()
            job.detached = True
            if self.state == "ready":
                job.expires = time.monotonic() + self.limits.deadline
            self.shelf.remember(job)
            self._queue.count(job)
            served = job.order.model in self.specs
            if served:
                self._queue.append(job)
                self._change.notify_all()
        if not served:
            self._end(job, "failed", RequestError("the model is no longer served"))
        return job

    def close(self) -> None:
        """Take nothing on, give back what waits, let what runs finish, and close the engines."""
        self.end_work()
        self.shelf.write_again()
        painting = self._threads[: len(self.workers)]
        for worker, thread in zip(self.workers, painting, strict=True):
            if not thread.is_alive():  # an engine that hangs cannot be closed
                worker.close()
        if self.journal is not None:
            self.journal.close()

    def end_work(self) -> None:
        """Give back what waits, and what still runs when the time of grace is over."""
        self.refuse_new()
        started = [thread for thread in self._threads if thread.ident is not None]
        _join(started, self.limits.grace)
        for worker in self.workers:
            if (job := worker.job) is not None:
                job.given_up.set()
        _join(started, STOP_SECONDS)
        for worker in self.workers:
            if (job := worker.job) is not None:  # its client gets an answer all the same
                self._end(job, "given back", _closing())
        _join(started, HANGING_SECONDS)

    def refuse_new(self) -> None:
        """Take nothing on any more, and give back what waits; what runs goes on."""
        with self._change:
            self.state = "closing"
            given_back = self._queue.clear()
            self._change.notify_all()
        for job in given_back:
            self._end(job, "given back", _closing())

    # --- what is there -------------------------------------------------------------------------

    @property
    def models(self) -> Mapping[str, Runner]:
        """The models by name; those of the first worker, who has the same as the others."""
        return self.workers[0].runners

    def runner(self, model: str | None) -> tuple[str, Runner]:
        """Return a model by its name, or the first.

        Raises:
            ModelNotFoundError: unknown model.
            ClosingError: it is still being loaded.
        """
        model = model or next(iter(self.specs))
        if model not in self.specs:
            raise ModelNotFoundError(
                "unknown model",
                seen=model[:80],
                allowed=", ".join(self.specs),
                setting="model",
            )
        if self.state == "starting":
            raise _starting()
        return model, self.models[model]

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Jobs that are painted."""
        return sum(worker.job is not None for worker in self.workers)

    def answers(self) -> bool:
        """Say whether models are loaded and devices compute; one at work in time does."""
        if self.state != "ready":
            return False
        return all(worker.answers() for worker in self.workers)

    def gauges(self) -> Gauges:
        """Return the figures of this moment."""
        runners = {worker.name: worker.first for worker in self.workers}
        return Gauges(
            queue=self.depth,
            running=self.running,
            memory={name: runner.memory for name, runner in runners.items() if runner},
        )

    def job(self, name: str, client: str | None = None) -> Job | None:
        """Return a job by its id, if it is this client's; None stands for any.

        Raises:
            ClosingError: only the journal may know it, and the server is being stopped.
            JournalError: the journal cannot be read.
        """
        found = self.shelf.find(name)
        if found is None and self.journal is not None:
            if self.state == "closing":
                raise _closing()
            found = self.journal.job(name)
            if found is not None and client in (None, found.client) and not found.ended:
                found = self._take_up(found)
        return found if found and client in (None, found.client) else None

    # --- jobs ----------------------------------------------------------------------------------

    def submit(
        self,
        order: Order,
        client: str,
        *,
        idempotency: str | None = None,
        digest: str = "",
        sent_digest: str = "",
        detached: bool = False,
        expires: float | None = None,
    ) -> Job:
        """Accept an order, or return the job it became before.

        Args:
            order: what is to be painted.
            client: whose it is.
            idempotency: the client's own name of it: the same name is the same job.
            digest: of what was asked.
            sent_digest: of the body's bytes; jobs of a journal of version 1 have no other.
            detached: it is painted even if nobody waits for it.
            expires: its deadline by `time.monotonic`; if left out, counted from now.

        Raises:
            BusyError: too much waits already.
            ClosingError: the server is being stopped.
            RequestError: the name stands for another order.
            JournalError: the journal cannot be read or written.
        """
        job = Job(
            order=order, client=client, idempotency=idempotency, digest=digest,
            sent_digest=sent_digest, detached=detached,
            expires=expires or time.monotonic() + self.limits.deadline,
        )  # fmt: skip
        if idempotency is None:
            return self._accept(job)
        patience = min(RESERVED_SECONDS, self.limits.deadline)
        return self.shelf.once(
            job, lambda: self._find_named(client, idempotency) or self._accept(job), patience
        )

    def _find_named(self, client: str, idempotency: str) -> Job | None:
        """Return the job that the journal has under a name; one that has not ended is queued."""
        if self.journal is None or self.state == "closing":
            return None
        found = self.journal.by_idempotency(client, idempotency)
        if found is None:
            return None
        if not found.ended:
            return self._take_up(found)
        self.shelf.remember(found)
        return found

    def _accept(self, job: Job) -> Job:
        """Write a new job into the journal and queue it."""
        with self._change:
            self._check_ready()
            self._queue.check_room(job.client)
            self._queue.count(job)
            self.shelf.remember(job)
        try:
            if self.journal is not None:
                self.journal.accept(job)
        except BaseException:
            with self._change:
                self.shelf.forget(job)
                if job.claim():
                    self._queue.uncount(job)
            raise
        with self._change:
            closing = self.state == "closing"
            if job.claimed:  # its deadline passed while it was written
                self.shelf.write_later(job, "failed", late_error(job))
            elif not closing:
                self._queue.append(job)
                self._change.notify_all()  # the thread that keeps time waits there, too
        if closing:
            self._end(job, "given back", _closing())
        log.info("accepted", extra=about(job, position=job.position))
        return job

    def _check_ready(self) -> None:
        if self.state != "ready":
            raise _closing() if self.state == "closing" else _starting()

    def cancel(self, job: Job) -> None:
        """Give a job up: at once if it waits, else before its next step."""
        job.given_up.set()
        with self._change:
            waited = self._queue.remove(job)
        if waited:
            self._end(job, "cancelled", cancelled_error())

    def leave(self, job: Job) -> None:
        """Say that a client went away; a job that nobody waits for any more is given up."""
        if not job.ended and not job.detached and not job.followers:
            self.cancel(job)

    # --- workers -------------------------------------------------------------------------------

    def _work(self, worker: Worker) -> None:
        while (job := self._next(worker)) is not None:
            try:
                self._run(worker, job)
            except BaseException:  # the next job must find a worker, whatever this one raised
                log.exception("worker failed", extra=about(job))
                self._end(job, "failed", unknown_failure())
            finally:
                worker.job = None

    def _next(self, worker: Worker) -> Job | None:
        with self._change:
            while not self._queue and self.state != "closing":
                self._change.wait()
            if not self._queue:
                return None
            job = worker.job = self._queue.take()
            return job

    def _keep_time(self) -> None:
        deadlines = Deadlines(self._change, self._queue, self.shelf, self._end)
        deadlines.every(REWRITE_SECONDS, self.shelf.write_again)
        if self.journal is not None:
            deadlines.every(TIDY_SECONDS, self.journal.forget_old)
        deadlines.run(lambda: self.state == "closing")

    def _run(self, worker: Worker, job: Job) -> None:
        if not job.start():
            return  # its deadline passed just now
        start = time.perf_counter()

        def end(state: State, error: DanqingError | None = None) -> None:
            if state == "done":
                self._queue.add_seconds(time.perf_counter() - start)
            elif state == "cancelled" and self.state == "closing":
                state, error = "given back", _closing()
            self._end(job, state, error)

        self._note_start(job)
        worker.run(job, end, checker=self.checker, metrics=self.metrics)

    def _note_start(self, job: Job) -> None:
        try:
            if self.journal is not None:
                self.journal.start(job)
        except Exception:  # it counts attempts alone
            log.exception("the journal lacks that a job began", extra=about(job))

    def _end(self, job: Job, state: State, error: DanqingError | None = None) -> None:
        """End a job, once; whatever fails meanwhile, those who wait for it are told."""
        with self._change:
            if not job.claim():
                return
            self._queue.uncount(job)
        try:
            self.shelf.write_end(job, state, error)
        finally:
            job.order = job.order.without_images()
            ended = job.end(state, error)
        if not ended:
            return  # writing took until after the deadline
        try:
            if self.metrics is not None:
                self.metrics.ended(job)
        except Exception:
            log.exception("a job was not counted", extra=about(job))
        took = {name: value for name, value in _times(job).items() if value is not None}
        problem = {} if error is None else {"error": type(error).__name__, "what": str(error)}
        log.info(state, extra=about(job, **took, **problem))


def _times(job: Job) -> dict[str, float | None]:
    waited = None if job.started is None else job.started - job.accepted
    took = None if job.started is None or job.finished is None else job.finished - job.started
    return {"waited": waited, "seconds": took}


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for threads to end, all together for so many seconds."""
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _closing() -> DanqingError:
    return ClosingError("the server is being stopped", hint="ask again in a moment")


def _starting() -> DanqingError:
    return ClosingError("the models are being loaded", hint="ask again in a moment; see /readyz")
