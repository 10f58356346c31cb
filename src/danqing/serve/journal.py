"""The journal: accepted jobs and their pictures in an SQLite file, so that they outlive a crash.

A job is in it before its client is told that it was accepted; its pictures and its end are written
in one transaction. What was accepted and had not ended is painted after a restart.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from typing import TYPE_CHECKING

from danqing.errors import BrokenPictureError, DanqingError, OutputError
from danqing.serve.jobs import Job, Painted, read_order

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from danqing.serve.jobs import State

SCHEMA = 1
KEPT_SECONDS = 24 * 3600.0
"""How long jobs that have ended are kept."""
_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, client TEXT NOT NULL, idempotency TEXT, digest TEXT NOT NULL,
  asked TEXT NOT NULL, state TEXT NOT NULL, runs INTEGER NOT NULL DEFAULT 0,
  accepted REAL NOT NULL, started REAL, finished REAL, error TEXT,
  UNIQUE (client, idempotency)
);
CREATE TABLE IF NOT EXISTS images (
  job TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, number INTEGER NOT NULL, data BLOB NOT NULL,
  PRIMARY KEY (job, number)
);
CREATE TABLE IF NOT EXISTS pictures (
  job TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, number INTEGER NOT NULL,
  output_format TEXT NOT NULL, record TEXT NOT NULL, data BLOB NOT NULL,
  PRIMARY KEY (job, number)
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, accepted);
"""


class Journal:
    """One file; safe to be called from several threads, used by one process."""

    def __init__(self, place: Path) -> None:
        """Open or make the file.

        Raises:
            OutputError: it is none, of another version, in use, or cannot be written.
        """
        self.place = place
        self._lock = threading.Lock()
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch(mode=0o600)  # it holds what people asked for, and their pictures
            self._base = sqlite3.connect(place, check_same_thread=False, isolation_level=None)
            # one process alone: two servers would paint the same jobs
            self._base.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")
            self._base.execute("PRAGMA foreign_keys = ON")
            version = self._base.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA):
                raise OutputError(
                    "the journal is of another version", seen=f"{place}: {version}", allowed="1"
                )
            self._base.executescript(_TABLES)
            self._base.execute(f"PRAGMA user_version = {SCHEMA}")
        except (sqlite3.Error, OSError) as error:
            raise OutputError(
                "the journal cannot be used",
                seen=f"{place}: {error}",
                hint="is another server using it? Is it an SQLite file?",
            ) from error

    def close(self) -> None:
        """Write everything into the one file."""
        with self._lock:
            self._base.close()

    def accept(self, job: Job) -> None:
        """Keep a job that is about to be accepted."""
        row = (job.id, job.client, job.idempotency, job.digest, job.order.as_json(), job.accepted)
        images = [(job.id, number, one) for number, one in enumerate(job.order.images())]
        with self._lock, self._transaction() as base:
            base.execute(
                "INSERT INTO jobs (id, client, idempotency, digest, asked, accepted, state)"
                " VALUES (?, ?, ?, ?, ?, ?, 'accepted')",
                row,
            )
            base.executemany("INSERT INTO images VALUES (?, ?, ?)", images)

    def start(self, job: Job) -> None:
        """Note that a worker begins with it."""
        with self._lock, self._transaction() as base:
            base.execute(
                "UPDATE jobs SET runs = runs + 1, started = ? WHERE id = ?", (job.started, job.id)
            )

    def end(self, job: Job, state: State, error: DanqingError | None = None) -> None:
        """Keep how a job ends, with its pictures, before its client is told."""
        rows = [
            (job.id, number, one.output_format, json.dumps(one.record), one.data)
            for number, one in enumerate(job.pictures)
        ]
        why = None if error is None else json.dumps(_as_row(error))
        with self._lock, self._transaction() as base:
            base.execute(
                "UPDATE jobs SET state = ?, finished = ?, error = ? WHERE id = ?",
                (state, time.time(), why, job.id),
            )
            base.execute("DELETE FROM images WHERE job = ?", (job.id,))
            base.executemany("INSERT INTO pictures VALUES (?, ?, ?, ?, ?)", rows)

    def forget_old(self, *, older_than: float = KEPT_SECONDS) -> None:
        """Drop jobs that ended long ago."""
        with self._lock, self._transaction() as base:
            base.execute("DELETE FROM jobs WHERE finished < ?", (time.time() - older_than,))

    def waiting(self) -> list[Job]:
        """Return the jobs that were accepted and have not ended, in their order."""
        with self._lock:
            query = "SELECT id FROM jobs WHERE state = 'accepted' ORDER BY accepted, rowid"
            names = [name for (name,) in self._base.execute(query)]
        found = (self.job(name) for name in names)
        return [job for job in found if job is not None]

    def by_idempotency(self, client: str, name: str) -> Job | None:
        """Return a client's job by the client's own name of it."""
        with self._lock:
            query = "SELECT id FROM jobs WHERE client = ? AND idempotency = ?"
            row = self._base.execute(query, (client, name)).fetchone()
        return None if row is None else self.job(row[0])

    def job(self, name: str) -> Job | None:
        """Return a job by its id."""
        with self._lock:
            row = self._base.execute(
                "SELECT client, idempotency, digest, asked, state, accepted, started, finished,"
                " error FROM jobs WHERE id = ?",
                (name,),
            ).fetchone()
            images = self._column("SELECT data FROM images WHERE job = ? ORDER BY number", name)
            pictures = self._base.execute(
                "SELECT output_format, record, data FROM pictures WHERE job = ? ORDER BY number",
                (name,),
            ).fetchall()
        if row is None:
            return None
        client, idempotency, digest, asked, state, accepted, started, finished, error = row
        return Job(
            id=name,
            client=client,
            idempotency=idempotency,
            digest=digest,
            order=read_order(asked, images),
            state="queued" if state == "accepted" else state,
            accepted=accepted,
            started=started,
            finished=finished,
            error=None if error is None else _read_error(json.loads(error)),
            pictures=[
                Painted(output_format=kind, record=json.loads(record), data=data)
                for kind, record, data in pictures
            ],
        )

    def _column(self, query: str, name: str) -> list[bytes]:
        return [value for (value,) in self._base.execute(query, (name,))]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write all of something or nothing.

        Raises:
            OutputError: the disk is full, say.
        """
        try:
            self._base.execute("BEGIN IMMEDIATE")
            yield self._base
            self._base.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):  # it may have been rolled back already
                self._base.execute("ROLLBACK")
            raise OutputError(
                "the journal cannot be written", seen=f"{self.place}: {error}"
            ) from error


def _as_row(error: DanqingError) -> dict[str, str | None]:
    return {
        "class": type(error).__name__,
        "what": error.what,
        "seen": error.seen,
        "allowed": error.allowed,
        "hint": error.hint,
    }


def _read_error(row: dict[str, str | None]) -> DanqingError:
    kinds = {kind.__name__: kind for kind in _kinds(DanqingError)}
    kind = kinds.get(row["class"] or "", BrokenPictureError)
    return kind(row["what"] or "", seen=row["seen"], allowed=row["allowed"], hint=row["hint"])


def _kinds(kind: type[DanqingError]) -> Iterator[type[DanqingError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)
