"""Random submissions, cancellations, deadlines and crashes: every accepted job ends, once."""

from __future__ import annotations

import collections
import contextlib
import random
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from danqing.errors import DanqingError
from danqing.serve import deadlines
from danqing.serve.journal import Journal
from tests.fakes import FakeRunner
from tests.serve.conftest import until
from tests.serve.fakes import make_order, make_service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from danqing.generation import Picture
    from danqing.serve.jobs import Job
    from danqing.serve.service import Service

STEPS = 60


class _Runner(FakeRunner):
    """Takes a moment for each image, fails now and then, and stops with its server."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dice, self.dead = random.Random(seed), threading.Event()

    def paint(self, *given: Any, **named: Any) -> Iterator[Picture]:
        time.sleep(self.dice.uniform(0, 0.004))
        if self.dead.is_set():
            raise SystemExit
        if self.dice.random() < 0.1:
            raise self.dice.choice([ValueError("a bug"), SystemExit(1), MemoryError()])
        yield from super().paint(*given, **named)


class _EndCounter(Journal):
    """Counts how often the journal was told that a job ends."""

    ends: collections.Counter[str]

    def end(self, job: Job, *given: Any, **named: Any) -> None:
        super().end(job, *given, **named)
        self.ends[job.id] += 1


class _Machine:
    """A server that lives many lives on one journal."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.lives = folder, seed, 0
        self.dice = random.Random(seed)
        self.accepted: dict[tuple[str, str], str] = {}
        self.told: dict[str, str] = {}
        self.ends: collections.Counter[str] = collections.Counter()
        self.start(folder / "0.db")

    def start(self, place: Path) -> None:
        self.place = place
        self.runner = _Runner(self.seed + self.lives)
        journal = _EndCounter(place)
        journal.ends = self.ends
        self.service: Service = make_service(
            self.runner, journal=journal, per_client=6, queue=12, deadline=30, grace=5
        )

    def submit(self) -> None:
        client, name = self.dice.choice("ab"), f"key {self.dice.randrange(25)}"
        order = make_order(seed=self.dice.randrange(9), count=self.dice.randint(1, 2))
        try:
            job = self.service.submit(order, client, idempotency=name, detached=True)
        except DanqingError:
            return
        assert self.accepted.setdefault((client, name), job.id) == job.id  # one job for ever

    def submit_together(self) -> None:
        """Let several threads ask under one name."""
        name, got = f"key {self.dice.randrange(25)}", list[str]()
        order = make_order()

        def ask() -> None:
            with contextlib.suppress(DanqingError):
                got.append(self.service.submit(order, "a", idempotency=name, detached=True).id)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(got)) <= 1
        for job in got:
            assert self.accepted.setdefault(("a", name), job) == job

    def _choose(self) -> Job | None:
        if not self.accepted:
            return None
        job = self.service.job(self.dice.choice(list(self.accepted.values())))
        assert job is not None  # nothing that was accepted is lost
        return job

    def look(self) -> None:
        job = self._choose()
        if job is not None and job.ended:
            assert self.told.setdefault(job.id, job.state) == job.state  # it does not change

    def cancel(self) -> None:
        job = self._choose()
        if job is not None and not job.ended:
            self.service.cancel(job)

    def forget(self) -> None:
        """Drop an ended job from memory, as time does."""
        job = self._choose()
        if job is not None and job.ended:
            with self.service._change:
                self.service.shelf.forget(job)

    def restart(self) -> None:
        """Stop in order, and start again."""
        self.service.close()
        self.lives += 1
        self.start(self.place)

    def kill(self) -> None:
        """Leave the server without closing it: go on with what was on disk at this moment."""
        self.lives += 1
        place = self.folder / f"{self.lives}.db"
        journal = self.service.journal
        assert journal is not None
        with journal._lock:
            before = collections.Counter(self.ends)
            for suffix in ("", "-wal"):
                if Path(f"{self.place}{suffix}").exists():
                    shutil.copy(f"{self.place}{suffix}", f"{place}{suffix}")
        old = self.service
        self.runner.dead.set()
        assert isinstance(journal, _EndCounter)
        journal.ends = collections.Counter()  # what it does from now on never happened
        self.ends = before
        self.start(place)
        old.close()

    def check(self) -> None:
        """Let everything end, and compare with the journal."""
        jobs = [self.service.job(name) for name in self.accepted.values()]
        until(lambda: all(job is not None and job.ended for job in jobs))
        self.service.close()
        with sqlite3.connect(self.place) as base:
            rows = dict(base.execute("SELECT id, state FROM jobs"))
            names = base.execute("SELECT client, idempotency, id FROM jobs").fetchall()
            doubled = base.execute(
                "SELECT job FROM pictures GROUP BY job, number HAVING count(*) > 1"
            ).fetchall()
        base.close()
        assert {(client, name): job for client, name, job in names} == self.accepted
        assert set(rows.values()) <= {"done", "failed", "cancelled"}
        assert {name: rows[name] for name in self.told} == self.told
        assert set(self.ends) == set(rows)
        assert set(self.ends.values()) <= {1}
        assert not doubled


@pytest.mark.parametrize("seed", range(4))
def test_every_accepted_job_ends_once(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "LOOK_SECONDS", 0.02)
    machine = _Machine(tmp_path, seed)
    actions = (
        [machine.submit] * 12 + [machine.submit_together] * 3 + [machine.look] * 4
        + [machine.cancel] * 3 + [machine.forget] * 3 + [machine.restart] + [machine.kill] * 2
    )  # fmt: skip
    for _ in range(STEPS):
        machine.dice.choice(actions)()
    machine.check()


@pytest.mark.slow
def test_every_accepted_job_ends_once_in_many_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(100, 140):
        folder = tmp_path / str(seed)
        folder.mkdir()
        test_every_accepted_job_ends_once(seed, folder, monkeypatch)
