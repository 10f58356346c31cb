"""Every request is answered by its deadline, whatever hangs, raises or dies meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from danqing.errors import DeadlineError
from danqing.serve import service as service_module
from danqing.serve.jobs import Job
from danqing.serve.journal import KEPT_SECONDS, Journal
from tests.fakes import FakeRunner
from tests.serve.asking import SlowJournal, ask, connected
from tests.serve.conftest import until
from tests.serve.fakes import make_order, make_service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from danqing.generation import Picture
    from danqing.serve.service import Service

DEADLINE = 0.3
MARGIN = 6.0
YEAR = 365 * 24 * 3600.0


@pytest.fixture(autouse=True)
def _quick_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(service_module, "HANGING_SECONDS", 0.1)


class HangingRunner(FakeRunner):
    """A device call that does not return until the test is over."""

    def paint(self, *given: Any, **named: Any) -> Iterator[Picture]:
        assert self.gate is not None
        self.gate.wait(60)
        yield from FakeRunner().paint(*given, **named)


def _status(service: Service, gate: threading.Event | None = None, **more: Any) -> tuple[int, str]:
    """Return status and text of one answer, or UNANSWERED; then let go what hangs at the gate."""

    async def run() -> tuple[int, str]:
        async with connected(service) as client:
            answer = await ask(client, seconds=DEADLINE + MARGIN, **more)
        if gate is not None:
            gate.set()  # asyncio waits for its threads
        return answer.status_code, answer.text

    return asyncio.run(run())


@pytest.mark.finding(1)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_device_that_hangs(stream: bool) -> None:
    runner = HangingRunner(threading.Event())
    service = make_service(runner, deadline=DEADLINE, grace=0.1)
    status, text = _status(service, stream=stream)
    assert status == (200 if stream else 504)
    assert "deadline_exceeded" in text
    status, text = _status(service)  # it waits behind the one that hangs
    assert status == 504
    until(lambda: not service.answers())  # /readyz says so
    assert runner.gate is not None
    service.close()  # it ends, too
    assert runner.closed == 0
    runner.gate.set()


@pytest.mark.finding(1)
@pytest.mark.parametrize("operation", ["accept", "end", "by_idempotency"])
def test_a_disk_that_hangs(operation: str, tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "jobs.db")
    service = make_service(FakeRunner(), journal=journal, deadline=DEADLINE)
    journal.hang(operation)
    status, text = _status(service, journal.gate, key="x")
    assert status == 504
    assert "deadline_exceeded" in text
    service.close()


def test_the_deadline_counts_from_the_request_when_all_threads_are_busy(tmp_path: Path) -> None:
    runner = HangingRunner(threading.Event())
    service = make_service(runner, journal=Journal(tmp_path / "jobs.db"), deadline=1.5, grace=0.1)

    async def run() -> tuple[int, float]:
        with ThreadPoolExecutor(1) as executor:
            asyncio.get_running_loop().set_default_executor(executor)
            executor.submit(time.sleep, 1.4)
            start = time.monotonic()
            async with connected(service) as client:
                answer = await ask(client)
            return answer.status_code, time.monotonic() - start

    status, seconds = asyncio.run(run())
    assert status == 504
    assert seconds < 2.8
    assert runner.gate is not None
    runner.gate.set()
    service.close()


@pytest.mark.finding(1)
def test_a_journal_that_raises_anything_at_the_end(tmp_path: Path) -> None:
    class Raising(Journal):
        def end(self, *given: Any, **named: Any) -> None:
            raise RuntimeError("out of the ordinary")

    service = make_service(FakeRunner(), journal=Raising(tmp_path / "jobs.db"), deadline=5)
    status, text = _status(service)
    assert status == 200, text
    service.close()


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(SystemExit(1), marks=pytest.mark.finding(1)),
        pytest.param(KeyboardInterrupt(), marks=pytest.mark.finding(1)),
        MemoryError(),
    ],
)
def test_a_worker_survives_what_a_job_raises(error: BaseException) -> None:
    runner = FakeRunner()
    service = make_service(runner, deadline=5)
    runner.raises = error
    assert _status(service)[0] == 500
    runner.raises = None
    assert _status(service)[0] == 200
    service.close()


def test_metrics_that_raise_keep_nobody_waiting() -> None:
    class Raising:
        def painted(self, *_: Any) -> None:
            pass

        def ended(self, *_: Any) -> None:
            raise RuntimeError("out of the ordinary")

    service = make_service(FakeRunner(), metrics=Raising(), deadline=5)
    assert _status(service)[0] == 200
    assert _status(service)[0] == 200
    service.close()


def test_a_late_device_changes_nothing_after_the_deadline() -> None:
    runner = HangingRunner(threading.Event())
    service = make_service(runner, deadline=DEADLINE)
    job = service.submit(make_order(), "anna")
    until(lambda: job.ended)
    assert isinstance(job.error, DeadlineError)
    assert runner.gate is not None
    runner.gate.set()
    until(lambda: service.running == 0)
    assert (job.state, job.pictures) == ("failed", [])
    after = service.submit(make_order(), "anna")
    until(lambda: after.ended)
    assert after.state == "done"
    service.close()


# --- jobs that only the journal knows ------------------------------------------------------------


@pytest.mark.finding(1)
@pytest.mark.parametrize("how", ["id", "name", "delete"])
def test_a_row_that_no_worker_has_is_taken_up(how: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "jobs.db")
    gate = threading.Event()
    runner = FakeRunner(gate)
    service = make_service(runner, journal=journal)
    stray = Job(order=make_order(), client="local", idempotency="x", digest="a")
    journal.accept(stray)
    if how == "name":
        job = service.submit(make_order(), "local", idempotency="x", digest="a")
    else:
        found = service.job(stray.id, "local")
        assert found is not None
        job = found
    assert job.id == stray.id
    assert job.expires is not None
    assert service.job(stray.id) is job
    if how == "delete":
        service.cancel(job)
    gate.set()
    until(lambda: job.ended)
    assert job.state == ("cancelled" if how == "delete" else "done")
    service.shelf.forget(job)
    kept = service.job(stray.id)
    assert kept is not None
    assert kept.state == job.state
    service.close()


@pytest.mark.finding(1)
def test_a_row_that_hangs_again_ends_at_the_deadline(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "jobs.db")
    runner = HangingRunner(threading.Event())
    stray = Job(order=make_order(), client="local", idempotency="x")
    journal.accept(stray)
    service = make_service(runner, journal=journal, deadline=DEADLINE, grace=0.1)
    job = service.job(stray.id)
    assert job is not None
    until(lambda: job.ended, DEADLINE + MARGIN)
    assert isinstance(job.error, DeadlineError)
    assert runner.gate is not None
    runner.gate.set()
    service.close()


def test_the_end_of_a_job_is_written_when_the_disk_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "REWRITE_SECONDS", 0.1)
    gate = threading.Event()
    runner = FakeRunner(gate)
    journal = Journal(tmp_path / "jobs.db")
    service = make_service(runner, journal=journal)
    job = service.submit(make_order(count=8), "anna")
    until(lambda: service.running == 1)
    journal._base.execute("PRAGMA max_page_count = 1")
    gate.set()
    until(lambda: job.ended)
    assert [one.id for one in journal.waiting()] == [job.id]
    journal._base.execute("PRAGMA max_page_count = 100000")
    until(lambda: not journal.waiting(), 5)
    kept = journal.job(job.id)
    assert kept is not None
    assert (kept.state, len(kept.pictures)) == ("done", 8)
    service.close()


# --- a clock that jumps --------------------------------------------------------------------------


class Clock:
    """The machine's clock, as `time.time` has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jumped, real = 0.0, time.time
        monkeypatch.setattr(time, "time", lambda: real() + self.jumped)


@pytest.mark.parametrize("jump", [-YEAR, YEAR], ids=["back", "forth"])
def test_a_clock_that_jumps_loses_no_job(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    journal = Journal(tmp_path / "jobs.db")
    gate = threading.Event()
    runner = FakeRunner(gate)
    service = make_service(runner, journal=journal)
    first = service.submit(make_order(), "anna", idempotency="first")
    until(lambda: service.running == 1)
    second = service.submit(make_order(), "anna", idempotency="second")
    clock.jumped = jump
    third = service.submit(make_order(), "anna", idempotency="third")
    gate.set()
    until(lambda: third.ended)
    assert [one.state for one in (first, second, third)] == ["done"] * 3  # no deadline passed
    for job in (first, second, third):
        assert job.started is not None
        assert job.finished is not None
        assert 0 <= job.started - job.accepted < 60
        assert 0 <= job.finished - job.started < 60
        assert service.submit(make_order(), "anna", idempotency=job.idempotency) is job
    journal.forget_old()
    service.close()
    clock.jumped = -jump
    journal = Journal(tmp_path / "jobs.db")
    service = make_service(FakeRunner(), journal=journal)
    for job in (first, second, third):
        kept = service.job(job.id)
        assert kept is not None
        assert kept.state == "done"
    journal.forget_old(older_than=-1)  # by the journal's own clock they are old now
    assert journal.job(first.id) is None
    service.close()


@pytest.mark.parametrize("jump", [-YEAR, YEAR], ids=["back", "forth"])
def test_jobs_are_resumed_in_their_order_whatever_the_clock_said(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    journal = Journal(tmp_path / "jobs.db")
    jobs = []
    for number in range(4):
        clock.jumped = jump if number % 2 else 0.0
        jobs.append(Job(order=make_order(seed=number), client="anna"))
        journal.accept(jobs[-1])
    assert [one.id for one in journal.waiting()] == [one.id for one in jobs]
    service = make_service(FakeRunner(), journal=journal)
    resumed = [service.job(one.id) for one in jobs]
    until(lambda: all(one is not None and one.state == "done" for one in resumed))
    service.close()


def test_old_jobs_are_dropped_after_a_day_of_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "jobs.db")
    job = Job(order=make_order(), client="anna")
    journal.accept(job)
    journal.end(job, "cancelled", DeadlineError("late"))
    for share in (0.6, 0.6):  # in two lives of the server
        journal.forget_old()
        assert journal.job(job.id) is not None
        real = time.monotonic
        with monkeypatch.context() as later:
            later.setattr(time, "monotonic", lambda: real() + share * KEPT_SECONDS)  # noqa: B023
            journal.close()
        journal = Journal(tmp_path / "jobs.db")
    journal.forget_old()
    assert journal.job(job.id) is None
    journal.close()
