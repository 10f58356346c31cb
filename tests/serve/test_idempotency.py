"""One Idempotency-Key of one client is one job, however many requests name it at once."""

from __future__ import annotations

import asyncio
import collections
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

from danqing.errors import DanqingError, OutputError, RequestError
from danqing.serve import service as service_module
from danqing.serve.jobs import Job
from danqing.serve.journal import Journal
from tests.fakes import FakeRunner
from tests.serve.asking import GENERATIONS, SlowJournal, ask, connected
from tests.serve.conftest import until
from tests.serve.fakes import make_order, make_service

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from danqing.serve.service import Service

KEYS, CLIENTS = 40, 12


async def _ask_all(service: Service, keys: int, clients: int) -> list[tuple[str, httpx.Response]]:
    names = [f"key {number}" for number in range(keys) for _ in range(clients)]
    async with connected(service) as client:
        answers = await asyncio.gather(*(ask(client, name, seed=1) for name in names))
    return list(zip(names, answers, strict=True))


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(False, id="memory"),
        pytest.param(True, id="journal", marks=pytest.mark.finding(1)),
    ],
)
def test_forty_keys_by_twelve_clients_at_once(kept: bool, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "jobs.db") if kept else None
    service = make_service(FakeRunner(), journal=journal, per_client=64)
    answers = asyncio.run(_ask_all(service, KEYS, CLIENTS))
    statuses = collections.Counter(answer.status_code for _, answer in answers)
    assert statuses == {200: KEYS * CLIENTS}
    jobs = collections.defaultdict(set)
    for name, answer in answers:
        jobs[name].add(answer.json()["job"])
    assert [len(found) for found in jobs.values()] == [1] * KEYS
    assert len(set.union(*jobs.values())) == KEYS
    if journal is not None:
        assert _rows(journal) == [("done", 1)] * KEYS
    service.close()


def _rows(journal: Journal) -> list[tuple[str, int]]:
    """Return state and runs of all jobs."""
    return list(journal._base.execute("SELECT state, runs FROM jobs ORDER BY rowid"))


class _Callers:
    """Threads that submit one order under one name; what each got."""

    def __init__(self, service: Service, runner: FakeRunner, **more: Any) -> None:
        self.service, self.order, self.more = service, make_order(), more
        self.got: list[Any] = []
        self.threads: list[threading.Thread] = []

    def start(self, count: int = 1) -> None:
        for _ in range(count):
            self.threads.append(threading.Thread(target=self._submit, daemon=True))
            self.threads[-1].start()

    def _submit(self) -> None:
        try:
            job = self.service.submit(self.order, "anna", idempotency="x", **self.more)
        except Exception as error:
            self.got.append(error)
        else:
            self.got.append(job)

    def join(self) -> list[Any]:
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        return self.got


@pytest.mark.parametrize(
    "operation", [pytest.param("by_idempotency", marks=pytest.mark.finding(1)), "accept"]
)
def test_a_second_request_waits_for_the_first(operation: str, tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "jobs.db")
    runner = FakeRunner()
    service = make_service(runner, journal=journal)
    journal.hang(operation)
    callers = _Callers(service, runner)
    callers.start(6)
    assert journal.reached.wait(5)
    journal.gate.set()
    got = callers.join()
    assert all(isinstance(one, Job) for one in got), got
    assert len({id(one) for one in got}) == 1
    until(lambda: got[0].ended)
    assert _rows(journal) == [("done", 1)]
    service.close()


@pytest.mark.finding(1)
def test_the_others_get_the_error_of_the_first(tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "jobs.db")
    runner = FakeRunner()
    service = make_service(runner, journal=journal)
    journal.hang("accept")
    callers = _Callers(service, runner)
    callers.start()
    assert journal.reached.wait(5)
    callers.start(3)
    journal._base.execute("DROP TABLE images")
    journal._base.execute("DROP TABLE pictures")
    journal._base.execute("DROP TABLE jobs")
    journal.gate.set()
    got = callers.join()
    assert [isinstance(one, OutputError) for one in got] == [True] * 4
    assert all(str(tmp_path) not in str(one) for one in got)
    assert not service.shelf.keys
    service.close()


@pytest.mark.finding(1)
def test_a_request_does_not_wait_for_ever_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "RESERVED_SECONDS", 0.1)
    journal = SlowJournal(tmp_path / "jobs.db")
    runner = FakeRunner()
    service = make_service(runner, journal=journal)
    journal.hang("accept", "by_idempotency")
    callers = _Callers(service, runner)
    callers.start()
    assert journal.reached.wait(5)
    second = _Callers(service, runner)
    second.start()
    [error] = second.join()
    assert isinstance(error, DanqingError)
    assert error.http_status == 503
    journal.gate.set()
    [job] = callers.join()
    until(lambda: job.ended)
    assert job.state == "done"
    service.close()


@pytest.mark.finding(1)
def test_a_failed_submission_leaves_the_name_of_another_job_alone(tmp_path: Path) -> None:
    runner = FakeRunner()
    service = make_service(runner, journal=Journal(tmp_path / "jobs.db"))
    job = service.submit(make_order(), "anna", idempotency="x")
    other = Job(order=make_order(), client="anna", idempotency="x")
    service.shelf.forget(other)
    assert service.submit(make_order(), "anna", idempotency="x") is job
    service.close()


def test_another_request_under_the_same_name_is_refused(tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "jobs.db")
    runner = FakeRunner()
    service = make_service(runner, journal=journal)
    journal.hang("accept")
    callers = _Callers(service, runner, digest="a")
    callers.start()
    assert journal.reached.wait(5)
    with pytest.raises(RequestError, match="another request"):  # while the first is accepted
        service.submit(make_order(), "anna", idempotency="x", digest="b")
    journal.gate.set()
    [job] = callers.join()
    until(lambda: job.ended)
    with pytest.raises(RequestError, match="another request"):  # from memory
        service.submit(make_order(), "anna", idempotency="x", digest="b")
    service.shelf.forget(job)
    with pytest.raises(RequestError, match="another request"):  # from the journal
        service.submit(make_order(), "anna", idempotency="x", digest="b")
    again = service.submit(make_order(), "anna", idempotency="x", digest="a")
    assert again.id == job.id
    assert service.submit(make_order(), "ben", idempotency="x", digest="b").id != job.id
    service.close()


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "journal"])
def test_the_digest_is_of_what_was_asked_not_of_its_bytes(kept: bool, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "jobs.db") if kept else None
    service = make_service(FakeRunner(), journal=journal)
    asked: dict[str, Any] = {"prompt": "x", "size": "64x64", "seed": 5}
    turned = json.dumps(dict(reversed(asked.items())), indent=2)
    explicit = json.dumps({**asked, "negative_prompt": None, "seed": 5.0})

    async def run() -> list[httpx.Response]:
        async with connected(service) as client:
            headers = {"idempotency-key": "one", "content-type": "application/json"}
            return [
                await client.post(GENERATIONS, content=body, headers=headers)
                for body in (json.dumps(asked), turned, explicit, json.dumps({**asked, "seed": 6}))
            ]

    *same, other = asyncio.run(run())
    assert [one.status_code for one in same] == [200] * 3
    assert len({one.json()["job"] for one in same}) == 1
    assert other.status_code == 409
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    service.close()
