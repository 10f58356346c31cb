"""The service: a bounded queue of jobs, and for each device a worker that paints them."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import threading
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from danqing.errors import (
    BusyError,
    CancelledError,
    ClosingError,
    DanqingError,
    DeadlineError,
    OutputError,
    RefusedPictureError,
    RequestError,
)
from danqing.pictures import encode
from danqing.serve.jobs import Finished, Job, Moved, Painted, Stepped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from danqing.request import Listener, Picture, Progress, Request
    from danqing.serve.jobs import Order, State
    from danqing.serve.journal import Journal
    from danqing.serve.metrics import Metrics

log = logging.getLogger("danqing.serve")

KEPT_BYTES = 128 << 20
"""Of finished pictures that are kept in memory, so that they can be asked for again."""
KEPT_SECONDS = 3600.0
KEPT_JOBS = 256
_RECENT = 32
"""Jobs whose seconds are remembered, to say how long a client should wait."""


class Takes(Protocol):
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
    def spec(self) -> Takes:
        """What the model takes."""

    @property
    def plan(self) -> Placed:
        """Where it computes."""

    def load(self, listen: Listener | None = None) -> None:
        """Read the weights now."""

    def resolve(self, request: Request) -> tuple[Request, tuple[str, ...]]:
        """Fill in the model's defaults."""

    def with_seed(self, request: Request) -> Request:
        """Give a request without a seed one."""

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


class Service:
    """Takes jobs, lets workers paint them, and remembers what became of them."""

    def __init__(
        self,
        workers: Sequence[Worker],
        specs: Mapping[str, Takes],
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
        self._named: dict[tuple[str, str], Job] = {}
        self._pending: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._threads = [
            threading.Thread(target=self._work, args=(one,), name=f"danqing-{one.name}")
            for one in self.workers
        ]
        self._threads.append(threading.Thread(target=self._keep_time, name="danqing-deadlines"))

    # --- beginning and end ---------------------------------------------------------------------

    def load(self, listen: Callable[[str, Progress], None] = lambda _, __: None) -> None:
        """Load all models; then let the workers work, first on what the journal kept."""

        def heard(model: str, progress: Progress) -> None:
            if self.state == "closing":
                raise _closing()
            listen(model, progress)

        for worker in self.workers:
            worker.load(heard)
        if self.journal is not None:
            self.journal.forget_old()
            for job in self.journal.waiting():
                self._take_up(job)
        with self._change:
            if self.state == "starting":
                self.state = "ready"
        for thread in self._threads:
            thread.start()

    def _take_up(self, job: Job) -> None:
        """Queue a job of an earlier life of the server."""
        job.detached = True
        job.expires = time.monotonic() + self.limits.deadline
        with self._change:
            self._remember(job)
            self._pending[job.client] += 1
        if job.order.model not in self.specs:
            self._end(job, "failed", RequestError("its model is no longer served"))
            return
        with self._change:
            self._waiting.append(job)
            self._moved()

    def close(self) -> None:
        """Take nothing on, give back what waits, let what runs finish, and close the engines."""
        self.end_work()
        for worker in self.workers:
            worker.close()
        if self.journal is not None:
            self.journal.close()

    def end_work(self) -> None:
        """Give back what waits, and what still runs when the time of grace is over."""
        self.refuse_new()
        started = [thread for thread in self._threads if thread.ident is not None]
        until = time.monotonic() + self.limits.grace
        for thread in started:
            thread.join(max(0.0, until - time.monotonic()))
        for worker in self.workers:
            if (job := worker.job) is not None:
                job.given_up.set()
        for thread in started:
            thread.join()

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
            RequestError: there is none of this name.
            ClosingError: it is still being loaded.
        """
        model = model or next(iter(self.specs))
        if model not in self.specs:
            raise RequestError(
                "there is no such model here",
                seen=model,
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
        """Say whether models are loaded and devices compute; one at work does."""
        if self.state != "ready":
            return False
        return all(worker.job is not None or self._idle_answers(worker) for worker in self.workers)

    @staticmethod
    def _idle_answers(worker: Worker) -> bool:
        return all(painter.answers() for painter in worker.first())

    def job(self, name: str, client: str | None = None) -> Job | None:
        """Return a job by its id, if it is this client's; None stands for any."""
        with self._change:
            found = self._jobs.get(name)
        if found is None and self.journal is not None and self.state != "closing":
            found = self.journal.job(name)
        return found if found and client in (None, found.client) else None

    # --- jobs ----------------------------------------------------------------------------------

    def submit(
        self,
        order: Order,
        client: str,
        *,
        idempotency: str | None = None,
        digest: str = "",
        detached: bool = False,
    ) -> Job:
        """Accept an order, or return the job it became before.

        Args:
            order: what is to be painted.
            client: whose it is.
            idempotency: the client's own name of it: the same name is the same job.
            digest: of what was asked.
            detached: it is painted even if nobody waits for it.

        Raises:
            BusyError: too much waits already.
            ClosingError: the server is being stopped.
            RequestError: the name stands for another order.
        """
        if idempotency is not None:
            known = self._known(client, idempotency)
            if known is not None:
                if known.digest != digest:
                    raise RequestError(
                        "the Idempotency-Key was used for another request",
                        seen=idempotency,
                        setting="Idempotency-Key",
                    )
                return known
        job = Job(
            order=order, client=client, idempotency=idempotency, digest=digest, detached=detached,
            expires=time.monotonic() + self.limits.deadline,
        )  # fmt: skip
        with self._change:
            self._check_room(client)
            self._pending[client] += 1
            self._remember(job)
        try:
            if self.journal is not None:
                self.journal.accept(job)
        except Exception:
            with self._change:
                self._forget(job)
                self._settle(job)
            raise
        with self._change:
            closing = self.state == "closing"
            if not closing:
                self._waiting.append(job)
                job.position = len(self._waiting) - 1
                self._change.notify_all()  # the thread that keeps time waits there, too
        if closing:
            self._end(job, "given back", _closing())
        log.info("accepted", extra=self._about(job, position=job.position))
        return job

    def _known(self, client: str, idempotency: str) -> Job | None:
        with self._change:
            self._drop_old()
            found = self._named.get((client, idempotency))
        if found is None and self.journal is not None and self.state != "closing":
            found = self.journal.by_idempotency(client, idempotency)
        return found

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
            except Exception:  # the journal's disk, say; the next job must find a worker
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
        """Give up what waits for too long."""
        while True:
            with self._change:
                if self._change.wait_for(lambda: self.state == "closing", timeout=1.0):
                    return
                now = time.monotonic()
                late = [job for job in self._waiting if (job.expires or now) < now]
                for job in late:
                    self._waiting.remove(job)
                self._moved()
            for job in late:
                self._end(job, "failed", _late(job))

    def _moved(self) -> None:
        for position, job in enumerate(self._waiting):
            if job.position != position:
                job.tell(Moved(position))

    def _run(self, worker: Worker, job: Job) -> None:
        job.started, job.state = time.time(), "running"
        if self.journal is not None:
            self.journal.start(job)
        start = time.perf_counter()
        try:
            self._check_time(job)
            self._paint(worker, job)
        except _GivenUpError:
            if self.state == "closing":
                self._end(job, "given back", _closing())
            else:
                self._end(job, "cancelled", _cancelled())
        except DanqingError as error:
            self._end(job, "failed", _without_frames(error))
        except Exception as error:  # one job's failure must not be the next one's
            log.exception("a job failed in an unknown way", extra=self._about(job))
            self._end(job, "failed", _bug(error))
            with contextlib.suppress(Exception):
                worker.painters[job.order.model].close()  # it loads again for the next
        else:
            self._seconds.append(time.perf_counter() - start)
            self._end(job, "done")

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
            raise _late(job)

    def _end(self, job: Job, state: State, error: DanqingError | None = None) -> None:
        with self._change:
            if job.ended:
                return
            self._settle(job)
        if self.journal is not None and state != "given back":
            try:
                self.journal.end(job, state, error)
            except OutputError:  # its client gets the answer; after a restart it is painted again
                log.exception("the journal lacks how a job ended", extra=self._about(job))
        job.end(state, error)
        if self.metrics is not None:
            self.metrics.ended(job)
        took = {name: value for name, value in _times(job).items() if value is not None}
        problem = {} if error is None else {"error": type(error).__name__, "what": error.what}
        log.info(state, extra=self._about(job, **took, **problem))

    # --- memory of jobs ------------------------------------------------------------------------

    def _settle(self, job: Job) -> None:
        self._pending[job.client] -= 1
        if self._pending[job.client] <= 0:
            del self._pending[job.client]

    def _remember(self, job: Job) -> None:
        self._drop_old()
        self._jobs[job.id] = job
        if job.idempotency is not None:
            self._named[job.client, job.idempotency] = job

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        if job.idempotency is not None:
            self._named.pop((job.client, job.idempotency), None)

    def _drop_old(self) -> None:
        """Forget jobs that ended long ago, and the oldest if their pictures are too many bytes."""
        held = sum(job.size_bytes for job in self._jobs.values())
        for job in list(self._jobs.values()):
            old = time.time() - (job.finished or time.time()) > KEPT_SECONDS
            if not job.ended or not (old or held > KEPT_BYTES or len(self._jobs) > KEPT_JOBS):
                continue
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
    request = painter.with_seed(order.request)
    request, notes = painter.resolve(request)
    _check_limit("num_inference_steps", request.num_inference_steps or 0, limits.steps)
    _check_limit("n", request.num_images_per_prompt, limits.pictures)
    for name in ("height", "width"):
        _check_limit(name, getattr(request, name) or 0, limits.side)
    return replace(order, request=request, notes=(*order.notes, *notes))


def _check_limit(name: str, value: int, most: int) -> None:
    if value > most:
        raise RequestError(
            f"{name} is too large for this server", seen=value, allowed=f"1 to {most}", setting=name
        )


def _painted(picture: Picture, order: Order) -> Painted:
    record = picture.record()
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


def _bug(error: Exception | None) -> DanqingError:
    seen = None if error is None else f"{type(error).__name__}: {str(error)[:200]}"
    return DanqingError("this job failed in a way danqing does not know", seen=seen)


def _late(job: Job) -> DanqingError:
    return DeadlineError(
        "the pictures were not finished in time",
        seen=f"{time.time() - job.accepted:.0f} s, waiting included",
        hint="fewer steps, pictures or pixels; or ask when less waits",
    )


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
