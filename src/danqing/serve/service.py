"""The service: a bounded queue of jobs, and for each device a worker that paints them."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import statistics
import threading
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from danqing.errors import (
    BusyError,
    CancelledError,
    ClosingError,
    DanqingError,
    JournalBusyError,
    JournalError,
    ModelNotFoundError,
    RefusedPictureError,
    RequestError,
)
from danqing.pictures import encode
from danqing.serve.jobs import (
    LATE_SECONDS,
    Finished,
    Job,
    Moved,
    Painted,
    Stepped,
    late_error,
)
from danqing.serve.privacy import public_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from danqing.generation import Picture, Progress
    from danqing.request import Request, Resolved
    from danqing.runner import Listener
    from danqing.serve.jobs import Order, State
    from danqing.serve.journal import Journal
    from danqing.serve.metrics import Metrics

log = logging.getLogger("danqing.serve")

KEPT_BYTES = 128 << 20
"""Of finished pictures that are kept in memory, so that they can be asked for again."""
KEPT_SECONDS = 3600.0
KEPT_JOBS = 256
RESERVED_SECONDS = 10.0
"""How long a request waits for an earlier one with its Idempotency-Key to be accepted."""
STOP_SECONDS = 5.0
"""After the grace at shutdown, how long a running job may take to notice that it was given up."""
HANGING_SECONDS = 60.0
"""After that, how long shutdown waits for a device that computes before it leaves it alone."""
LOOK_SECONDS = 0.5
"""Between two looks of the thread that keeps the deadlines."""
REWRITE_SECONDS = 5.0
"""Between two attempts to write ends of jobs that the journal could not take."""
TIDY_SECONDS = 600.0
"""Between two deletions of old jobs from the journal."""
_RECENT = 32
"""Jobs whose seconds are remembered, to say how long a client should wait."""


class Spec(Protocol):
    """What a model takes, as `danqing.models.base.ModelSpec` says it."""

    @property
    def title(self) -> str:
        """How it is shown to people."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Value of each setting that a request leaves out."""

    @property
    def no_effect(self) -> Mapping[str, str]:
        """Settings that would change nothing, each with the reason."""

    @property
    def size_multiple(self) -> int:
        """Height and width are multiples of it, in pixels."""

    @property
    def limits(self) -> Mapping[str, int]:
        """The largest value of some settings."""

    def resolve(self, request: Request) -> Resolved:
        """Fill in the model's defaults, and a seed."""


class Placed(Protocol):
    """Where a model computes, as `danqing.plan.Plan` says it."""

    @property
    def device(self) -> str:
        """Name of the device."""

    @property
    def chip(self) -> str:
        """What it is."""

    @property
    def dtype(self) -> str:
        """What it computes in."""

    @property
    def placement(self) -> str:
        """Where weights are while they are not needed."""


class Painter(Protocol):
    """What a worker lets paint: `danqing.engine.Engine`, or a fake in a test."""

    @property
    def spec(self) -> Spec:
        """What the model takes."""

    @property
    def plan(self) -> Placed:
        """Where it computes."""

    def load(self, listen: Listener | None = None) -> None:
        """Read the weights now."""

    def tokens(self, request: Request) -> tuple[int, int, int]:
        """Return the tokens of prompt, pictures to edit, and a picture painted."""

    def paint(
        self, request: Request, *, listen: Listener | None = None, previews: int = 0
    ) -> Iterator[Picture]:
        """Yield the pictures as they are finished."""

    def answers(self) -> bool:
        """Say whether the device computes."""

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of the device."""

    def close(self) -> None:
        """Give all memory back; it loads again when it is used again."""


class Checker(Protocol):
    """Says which pictures must not be handed out."""

    name: str

    def refuses(self, picture: Picture) -> str | None:
        """Return why a picture is refused, or None."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the service takes on.

    Attributes:
        queue: jobs that wait.
        per_client: jobs of one client that wait or run.
        side: of a picture, in pixels.
        steps: of one picture.
        pictures: of one job.
        deadline: seconds from acceptance to the last picture.
        grace: seconds that a running job has to finish when the server is stopped.
    """

    queue: int = 64
    per_client: int = 16
    side: int = 1024
    steps: int = 100
    pictures: int = 10
    deadline: float = 600.0
    grace: float = 30.0


class Worker:
    """A device's thread, and the engines of all models there."""

    def __init__(self, name: str, openers: Mapping[str, Callable[[], Painter]]) -> None:
        """Keep how the engines are opened, by model's name."""
        self.name = name
        self._openers = dict(openers)
        self.painters: dict[str, Painter] = {}
        self.job: Job | None = None

    def load(self, listen: Callable[[str, Progress], None]) -> None:
        """Open all engines and read their weights."""
        for model, opener in self._openers.items():
            painter = self.painters[model] = opener()
            painter.load(lambda progress, model=model: listen(model, progress))  # type: ignore[misc]

    def first(self) -> list[Painter]:
        """Return one of its engines, if it has any yet."""
        return list(self.painters.values())[:1]

    def close(self) -> None:
        """Give all memory back."""
        for painter in self.painters.values():
            painter.close()


class _GivenUpError(Exception):
    """Ends the work from within a listener."""


@dataclass(eq=False)
class _Reservation:
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
        self.error = error if isinstance(error, DanqingError) else _bug(None)
        self.filled.set()


class Service:
    """Spec jobs, lets workers paint them, and remembers what became of them."""

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
            checker: of finished pictures.
        """
        self.specs = dict(specs)
        self.workers = tuple(workers)
        self.limits = limits or Limits()
        self.journal = journal
        self.checker = checker
        self.metrics = metrics
        self.state: Literal["starting", "ready", "closing"] = "starting"
        self._change = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._named: dict[tuple[str, str], _Reservation] = {}
        self._unwritten: list[tuple[Job, State, DanqingError | None]] = []
        self._pending: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=_RECENT)
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

        self._take_stock()
        for worker in self.workers:
            worker.load(heard)
        with self._change:
            for job in self._waiting:
                job.expires = time.monotonic() + self.limits.deadline
            if self.state == "starting":
                self.state = "ready"
        for thread in self._threads:
            thread.start()

    def _take_stock(self) -> None:
        """Take up the jobs of an earlier life of the server, before a client can ask for one."""
        if self.journal is None:
            return
        self.journal.forget_old()
        jobs = self.journal.waiting()
        for job in jobs:
            self._take_up(job)
        row = {"resumed": len(jobs), "unreadable": self.journal.unreadable}
        if self.journal.unreadable:
            log.error("journal opened; jobs that cannot be read failed", extra={"row": row})
        else:
            log.info("journal opened", extra={"row": row})

    def _take_up(self, job: Job) -> Job:
        """Queue a job that only the journal knows, and return it, or the one that is queued."""
        with self._change:
            known = self._jobs.get(job.id)
            if known is not None:
                return known
            if self.state == "closing":
                raise _closing()
            job.detached = True
            if self.state == "ready":
                job.expires = time.monotonic() + self.limits.deadline
            self._remember(job)
            self._pending[job.client] += 1
            served = job.order.model in self.specs
            if served:
                self._waiting.append(job)
                self._moved()
                self._change.notify_all()
        if not served:
            self._end(job, "failed", RequestError("its model is no longer served"))
        return job

    def close(self) -> None:
        """Take nothing on, give back what waits, let what runs finish, and close the engines."""
        self.end_work()
        self._write_again()
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
            given_back = list(self._waiting)
            self._waiting.clear()
            self._change.notify_all()
        for job in given_back:
            self._end(job, "given back", _closing())

    # --- what is there -------------------------------------------------------------------------

    @property
    def models(self) -> Mapping[str, Painter]:
        """The models by name; those of the first worker, who has the same as the others."""
        return self.workers[0].painters

    def painter(self, model: str | None) -> tuple[str, Painter]:
        """Return a model by its name, or the first.

        Raises:
            ModelNotFoundError: there is none of this name.
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
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that are painted."""
        return sum(worker.job is not None for worker in self.workers)

    def answers(self) -> bool:
        """Say whether models are loaded and devices compute; one at work in time does."""
        if self.state != "ready":
            return False
        return all(self._worker_answers(worker) for worker in self.workers)

    @staticmethod
    def _worker_answers(worker: Worker) -> bool:
        job = worker.job
        if job is None:
            return all(painter.answers() for painter in worker.first())
        return job.expires is None or time.monotonic() < job.expires + LATE_SECONDS

    def job(self, name: str, client: str | None = None) -> Job | None:
        """Return a job by its id, if it is this client's; None stands for any.

        Raises:
            ClosingError: only the journal may know it, and the server is being stopped.
            JournalError: the journal cannot be read.
        """
        with self._change:
            found = self._jobs.get(name)
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
        name = (client, idempotency)
        with self._change:
            self._drop_old()
            reservation = self._named.get(name)
            is_first = reservation is None
            if reservation is None:
                reservation = self._named[name] = _Reservation(digest)
        if not is_first:
            return self._wait_for(reservation, job)
        try:
            found = self._find_named(*name) or self._accept(job)
        except BaseException as error:
            with self._change:
                if self._named.get(name) is reservation:
                    del self._named[name]
            reservation.fail(error)
            raise
        reservation.fill(found)
        return _same(found, job)

    def _wait_for(self, reservation: _Reservation, job: Job) -> Job:
        """Return the job of an earlier request with the same Idempotency-Key.

        Raises:
            DanqingError: the earlier request's, or that it takes too long.
        """
        if reservation.job is None and reservation.digest != job.digest:
            raise _reused(job)
        if not reservation.filled.wait(min(RESERVED_SECONDS, self.limits.deadline)):
            raise JournalBusyError(
                "an earlier request with this Idempotency-Key is still being accepted",
                seen=job.idempotency,
                hint="ask again in a moment",
            )
        if reservation.error is not None:
            raise copy.copy(reservation.error)
        assert reservation.job is not None  # noqa: S101 - filled with a job or an error
        return _same(reservation.job, job)

    def _find_named(self, client: str, idempotency: str) -> Job | None:
        """Return the job that the journal has under a name; one that has not ended is queued."""
        if self.journal is None or self.state == "closing":
            return None
        found = self.journal.by_idempotency(client, idempotency)
        if found is None:
            return None
        if not found.ended:
            return self._take_up(found)
        with self._change:
            self._remember(found)
        return found

    def _accept(self, job: Job) -> Job:
        """Write a new job into the journal and queue it."""
        with self._change:
            self._check_room(job.client)
            self._pending[job.client] += 1
            self._remember(job)
        try:
            if self.journal is not None:
                self.journal.accept(job)
        except BaseException:
            with self._change:
                self._forget(job)
                if job.claim():
                    self._settle(job)
            raise
        with self._change:
            closing = self.state == "closing"
            if job.claimed:  # its deadline passed while it was written
                self._unwritten.append((job, "failed", late_error(job)))
            elif not closing:
                self._waiting.append(job)
                job.position = len(self._waiting) - 1
                self._change.notify_all()  # the thread that keeps time waits there, too
        if closing:
            self._end(job, "given back", _closing())
        log.info("accepted", extra=self._about(job, position=job.position))
        return job

    def _check_room(self, client: str) -> None:
        if self.state != "ready":
            raise _closing() if self.state == "closing" else _starting()
        if len(self._waiting) >= self.limits.queue:
            raise BusyError(
                "the queue is full",
                seen=f"{len(self._waiting)} jobs wait",
                allowed=f"at most {self.limits.queue}",
                retry_after=self._wait(len(self._waiting) // 4),
            )
        if self._pending[client] >= self.limits.per_client:
            raise BusyError(
                "there are too many jobs of this client",
                seen=f"{self._pending[client]} wait or run",
                allowed=f"at most {self.limits.per_client}",
                retry_after=self._wait(1),
            )

    def _wait(self, jobs: int) -> int:
        """Return the seconds that some jobs will take, in whole ones."""
        each = statistics.median(self._seconds) if self._seconds else 1.0
        return max(1, math.ceil(each * jobs / len(self.workers)))

    def cancel(self, job: Job) -> None:
        """Give a job up: at once if it waits, else before its next step."""
        job.given_up.set()
        with self._change:
            waited = job in self._waiting
            if waited:
                self._waiting.remove(job)
                self._moved()
        if waited:
            self._end(job, "cancelled", _cancelled())

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
                log.exception("worker failed", extra=self._about(job))
                self._end(job, "failed", _bug(None))
            finally:
                worker.job = None

    def _next(self, worker: Worker) -> Job | None:
        with self._change:
            while not self._waiting and self.state != "closing":
                self._change.wait()
            if not self._waiting:
                return None
            job = worker.job = self._waiting.popleft()
            self._moved()
            return job

    def _keep_time(self) -> None:
        """End jobs at their deadline, and keep the journal in order."""
        rewritten = tidied = time.monotonic()
        while True:
            with self._change:
                if self._change.wait_for(lambda: self.state == "closing", timeout=LOOK_SECONDS):
                    return
            try:
                self._end_late()
                now = time.monotonic()
                if now - rewritten > REWRITE_SECONDS:
                    rewritten = now
                    self._write_again()
                if now - tidied > TIDY_SECONDS and self.journal is not None:
                    tidied = now
                    self.journal.forget_old()
            except Exception:  # it must go on keeping the time
                log.exception("keeping deadlines failed")

    def _end_late(self) -> None:
        """End the jobs whose deadline has passed: waiting, running, and hanging in their end."""
        with self._change:
            now = time.monotonic()
            late = [
                job
                for job in self._jobs.values()
                if not job.ended and job.expires is not None and job.expires < now
            ]
            for job in late:
                if job in self._waiting:
                    self._waiting.remove(job)
            self._moved()
        for job in late:
            job.given_up.set()
            if not job.claimed:
                self._end(job, "failed", late_error(job))
            elif job.expires is not None and job.expires + LATE_SECONDS < now:
                job.end_late()

    def _write_again(self) -> None:
        """Write the ends of jobs that the journal could not take when they ended."""
        if self.journal is None:
            return
        with self._change:
            unwritten, self._unwritten = self._unwritten, []
        for number, (job, state, error) in enumerate(unwritten):
            try:
                self.journal.end(job, state, error)
            except JournalError:
                with self._change:
                    self._unwritten = unwritten[number:] + self._unwritten
                return

    def _moved(self) -> None:
        for position, job in enumerate(self._waiting):
            if job.position != position:
                job.tell(Moved(position))

    def _run(self, worker: Worker, job: Job) -> None:
        if not job.start():
            return  # its deadline passed just now
        start = time.perf_counter()
        try:
            self._note_start(job)
            self._check_time(job)
            self._paint(worker, job)
        except _GivenUpError:
            if self.state == "closing":
                self._end(job, "given back", _closing())
            else:
                self._end(job, "cancelled", _cancelled())
        except DanqingError as error:
            self._end(job, "failed", _without_frames(error))
        except BaseException as error:  # one job's failure must not be the next one's
            log.exception("a job failed in an unknown way", extra=self._about(job))
            self._end(job, "failed", _bug(error))
            with contextlib.suppress(Exception):
                worker.painters[job.order.model].close()  # it loads again for the next
        else:
            self._seconds.append(time.perf_counter() - start)
            self._end(job, "done")

    def _note_start(self, job: Job) -> None:
        if self.journal is None:
            return
        try:
            self.journal.start(job)
        except JournalError:  # it counts attempts alone
            log.exception("the journal lacks that a job began", extra=self._about(job))

    def _paint(self, worker: Worker, job: Job) -> None:
        painter, order = worker.painters[job.order.model], job.order
        previews = 0

        def listen(progress: Progress) -> None:
            nonlocal previews
            self._check_time(job)
            previews += progress.preview is not None
            job.tell(Stepped(progress, len(job.pictures), previews))

        pictures = painter.paint(order.request, listen=listen, previews=order.previews)
        with contextlib.closing(pictures):  # type: ignore[type-var]
            for picture in pictures:
                if self.checker is not None and (why := self.checker.refuses(picture)):
                    raise _refused(self.checker, why)
                job.tell(Finished(_painted(picture, order), picture.index))
                if self.metrics is not None:
                    self.metrics.painted(order.model, picture)
                self._check_time(job)
                previews = 0

    @staticmethod
    def _check_time(job: Job) -> None:
        if job.given_up.is_set():
            raise _GivenUpError
        if job.expires is not None and time.monotonic() > job.expires:
            raise late_error(job)

    def _end(self, job: Job, state: State, error: DanqingError | None = None) -> None:
        """End a job, once; whatever fails meanwhile, those who wait for it are told."""
        with self._change:
            if not job.claim():
                return
            self._settle(job)
        try:
            if self.journal is not None and state != "given back":
                self._write_end(job, state, error)
        finally:
            job.order = job.order.without_images()
            ended = job.end(state, error)
        if not ended:
            return  # writing took until after the deadline
        try:
            if self.metrics is not None:
                self.metrics.ended(job)
        except Exception:
            log.exception("a job was not counted", extra=self._about(job))
        took = {name: value for name, value in _times(job).items() if value is not None}
        problem = {} if error is None else {"error": type(error).__name__, "what": str(error)}
        log.info(state, extra=self._about(job, **took, **problem))

    def _write_end(self, job: Job, state: State, error: DanqingError | None) -> None:
        assert self.journal is not None  # noqa: S101 - the caller asked
        try:
            self.journal.end(job, state, error)
        except JournalError:  # its client gets the answer
            log.exception("the journal lacks how a job ended", extra=self._about(job))
            with self._change:
                self._unwritten.append((job, state, error))
        except Exception:
            log.exception("the journal lacks how a job ended", extra=self._about(job))

    # --- memory of jobs ------------------------------------------------------------------------

    def _settle(self, job: Job) -> None:
        self._pending[job.client] -= 1
        if self._pending[job.client] <= 0:
            del self._pending[job.client]

    def _remember(self, job: Job) -> None:
        self._drop_old()
        self._jobs[job.id] = job
        if job.idempotency is not None:
            name = (job.client, job.idempotency)
            if name not in self._named:  # else the request that reserved it fills it
                self._named[name] = _Reservation(job.digest)
                self._named[name].fill(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        if job.idempotency is not None:
            name = (job.client, job.idempotency)
            reservation = self._named.get(name)
            if reservation is not None and reservation.job is job:
                del self._named[name]

    def _drop_old(self) -> None:
        """Forget jobs that ended long ago, and the oldest if their pictures are too many bytes."""
        held = sum(job.size_bytes for job in self._jobs.values())
        unwritten = {job.id for job, _, _ in self._unwritten}
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if job.ended_at is None or job.id in unwritten:
                continue
            old = now - job.ended_at > KEPT_SECONDS
            if old or held > KEPT_BYTES or len(self._jobs) > KEPT_JOBS:
                held -= job.size_bytes
                self._forget(job)

    @staticmethod
    def _about(job: Job, **more: Any) -> dict[str, Any]:
        row = {"job": job.id, "client": job.client, "model": job.order.model}
        if job.order.user is not None:
            row["user"] = job.order.user
        return {"row": {**row, "prompt": job.order.request.prompt, **more}}


def plan_order(painter: Painter, order: Order, limits: Limits) -> Order:
    """Fill in an order's request, and see that it is one the service takes.

    Raises:
        RequestError: a setting cannot be, would have no effect, or is beyond a limit.
    """
    resolved = painter.spec.resolve(order.request)
    _check_limit("num_inference_steps", resolved.num_inference_steps, limits.steps)
    _check_limit("n", resolved.num_images_per_prompt, limits.pictures)
    for name in ("height", "width"):
        _check_limit(name, getattr(resolved, name), limits.side)
    return replace(order, request=resolved.request, notes=(*order.notes, *resolved.notes))


def _check_limit(name: str, value: int, most: int) -> None:
    if value > most:
        raise RequestError(
            f"{name} is too large for this server", seen=value, allowed=f"1 to {most}", setting=name
        )


def _painted(picture: Picture, order: Order) -> Painted:
    record = public_record(picture.record(), order.model)
    data = encode(picture.image, record, order.output_format, quality=order.quality)
    return Painted(data=data, output_format=order.output_format, record=record)


def _times(job: Job) -> dict[str, float | None]:
    waited = None if job.started is None else job.started - job.accepted
    took = None if job.started is None or job.finished is None else job.finished - job.started
    return {"waited": waited, "seconds": took}


def _without_frames(error: DanqingError) -> DanqingError:
    """Drop what an error refers to: frames that hold tensors."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def _bug(error: BaseException | None) -> DanqingError:
    seen = None if error is None else f"{type(error).__name__}: {str(error)[:200]}"
    return DanqingError("this job failed in a way danqing does not know", seen=seen)


def _same(found: Job, job: Job) -> Job:
    """Return the job that an Idempotency-Key stands for.

    Raises:
        RequestError: it was asked for by another request.
    """
    if found is not job and not found.asks_the_same(job.digest or "", job.sent_digest):
        raise _reused(job)
    return found


def _reused(job: Job) -> RequestError:
    return RequestError(
        "the Idempotency-Key was used for another request",
        seen=job.idempotency,
        setting="Idempotency-Key",
    )


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for threads to end, all together for so many seconds."""
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _cancelled() -> DanqingError:
    return CancelledError("the job was cancelled")


def _closing() -> DanqingError:
    return ClosingError("the server is being stopped", hint="ask again in a moment")


def _starting() -> DanqingError:
    return ClosingError("the models are being loaded", hint="ask again in a moment; see /readyz")


def _refused(checker: Checker, why: str) -> DanqingError:
    return RefusedPictureError(
        "the safety checker refused the picture", seen=f"{checker.name}: {why}"
    )
