"""A worker: one device's thread works with it, on one job at a time."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Protocol

from danqing.errors import DanqingError, RefusedPictureError
from danqing.pictures import encode
from danqing.serve.jobs import (
    LATE_SECONDS,
    Finished,
    Painted,
    Stepped,
    cancelled_error,
    late_error,
    unknown_failure,
)
from danqing.serve.logs import about
from danqing.serve.privacy import public_record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from danqing.generation import Picture, Progress
    from danqing.runner import Runner
    from danqing.serve.jobs import Job, Order, State
    from danqing.serve.metrics import Metrics


log = logging.getLogger("danqing.serve")


class Checker(Protocol):
    """Says which images must not be handed out."""

    name: str

    def refuses(self, picture: Picture) -> str | None:
        """Return why an image is refused, or None."""


class _GivenUpError(Exception):
    """Ends the work from within a listener."""


class Worker:
    """A device, and the runners of all models there.

    Attributes:
        name: of the device.
        runners: by model's name, once they are open.
        job: that it works on.
    """

    def __init__(self, name: str, openers: Mapping[str, Callable[[], Runner]]) -> None:
        """Keep how the runners are opened, by model's name."""
        self.name = name
        self._openers = dict(openers)
        self.runners: dict[str, Runner] = {}
        self.job: Job | None = None

    def load(self, listen: Callable[[str, Progress], None]) -> None:
        """Open all runners and read their weights."""
        for model, opener in self._openers.items():
            runner = self.runners[model] = opener()
            runner.load(lambda progress, model=model: listen(model, progress))  # type: ignore[misc]

    @property
    def first(self) -> Runner | None:
        """One of its runners, if it has any yet."""
        return next(iter(list(self.runners.values())), None)

    def answers(self) -> bool:
        """Say whether the device computes; one at work does until its job is late."""
        job = self.job
        if job is None:
            return self.first is None or self.first.answers()
        return job.expires is None or time.monotonic() < job.expires + LATE_SECONDS

    def close(self) -> None:
        """Give all memory back."""
        for runner in self.runners.values():
            runner.close()

    def run(
        self,
        job: Job,
        end: Callable[[State, DanqingError | None], None],
        *,
        checker: Checker | None,
        metrics: Metrics | None,
    ) -> None:
        """Make a job's images, and end the job, whatever happens."""
        try:
            self._paint(job, checker=checker, metrics=metrics)
        except _GivenUpError:
            end("cancelled", cancelled_error())
        except DanqingError as error:
            end("failed", _without_frames(error))
        except BaseException as error:  # one job's failure must not be the next one's
            log.exception("a job failed in an unknown way", extra=about(job))
            end("failed", unknown_failure(error))
            with contextlib.suppress(Exception):
                self.runners[job.order.model].close()  # it loads again for the next
        else:
            end("done", None)

    def _paint(self, job: Job, *, checker: Checker | None, metrics: Metrics | None) -> None:
        """Tell those who follow the job of each image and step."""
        _check_time(job)
        order, previews = job.order, 0

        def listen(progress: Progress) -> None:
            nonlocal previews
            _check_time(job)
            previews += progress.preview is not None
            job.tell(Stepped(progress, len(job.pictures), previews))

        runner = self.runners[order.model]
        pictures = runner.paint(order.request, listen=listen, previews=order.previews)
        with contextlib.closing(pictures):  # type: ignore[type-var]
            for picture in pictures:
                if checker is not None and (why := checker.refuses(picture)):
                    raise _refused(checker, why)
                job.tell(Finished(_painted(picture, order), picture.index))
                if metrics is not None:
                    metrics.painted(order.model, picture)
                _check_time(job)
                previews = 0


def _check_time(job: Job) -> None:
    if job.given_up.is_set():
        raise _GivenUpError
    if job.expires is not None and time.monotonic() > job.expires:
        raise late_error(job)


def _without_frames(error: DanqingError) -> DanqingError:
    """Drop what an error refers to: frames that hold tensors."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def _painted(picture: Picture, order: Order) -> Painted:
    record = public_record(picture.record(), order.model)
    data = encode(picture.image, record, order.output_format, quality=order.quality)
    return Painted(data=data, output_format=order.output_format, record=record)


def _refused(checker: Checker, why: str) -> DanqingError:
    return RefusedPictureError(
        "the safety checker refused the image", seen=f"{checker.name}: {why}"
    )
