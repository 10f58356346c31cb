"""A worker: one device's thread works with it, on one job at a time."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Protocol

from danqing.errors import DanqingError, RefusedPictureError
from danqing.pictures import encode
from danqing.serve.jobs import LATE_SECONDS, Finished, Painted, Stepped, late_error
from danqing.serve.privacy import public_record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from danqing.generation import Picture, Progress
    from danqing.runner import Runner
    from danqing.serve.jobs import Job, Order
    from danqing.serve.metrics import Metrics


class Checker(Protocol):
    """Says which images must not be handed out."""

    name: str

    def refuses(self, picture: Picture) -> str | None:
        """Return why an image is refused, or None."""


class GivenUpError(Exception):
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

    def paint(self, job: Job, *, checker: Checker | None, metrics: Metrics | None) -> None:
        """Make a job's images, and tell those who follow it.

        Raises:
            GivenUpError: nobody wants it any more.
            DanqingError: it failed, is late, or an image was refused.
        """
        check_time(job)
        order, previews = job.order, 0

        def listen(progress: Progress) -> None:
            nonlocal previews
            check_time(job)
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
                check_time(job)
                previews = 0


def check_time(job: Job) -> None:
    """See that a job is still wanted, and in time.

    Raises:
        GivenUpError: it is not wanted.
        DeadlineError: it is late.
    """
    if job.given_up.is_set():
        raise GivenUpError
    if job.expires is not None and time.monotonic() > job.expires:
        raise late_error(job)


def _painted(picture: Picture, order: Order) -> Painted:
    record = public_record(picture.record(), order.model)
    data = encode(picture.image, record, order.output_format, quality=order.quality)
    return Painted(data=data, output_format=order.output_format, record=record)


def _refused(checker: Checker, why: str) -> DanqingError:
    return RefusedPictureError(
        "the safety checker refused the image", seen=f"{checker.name}: {why}"
    )
