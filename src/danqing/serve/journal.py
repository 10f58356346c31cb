"""The journal: accepted jobs and their pictures in an SQLite file, so that they outlive a crash.

A job is in it before its client is told that it was accepted; its pictures and its end are written
in one transaction. What was accepted and had not ended is painted after a restart.

The schema has a version (`PRAGMA user_version`). A journal of an older version is upgraded when it
is opened; `migrate` writes it for an older danqing. A journal of a newer version is left alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.errors import (
    DanqingError,
    JournalBusyError,
    JournalError,
    JournalFullError,
    RequestError,
)
from danqing.request import Request
from danqing.serve.jobs import ENDED, Job, Order
from danqing.serve.journal_file import (
    OLDEST,
    SCHEMA,
    check_file,
    check_schema,
    read_clock,
    tighten,
    unusable,
    upgrade,
)
from danqing.serve.journal_rows import error_row, read_job, read_model, read_number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from danqing.serve.jobs import State

log = logging.getLogger("danqing.serve")

KEPT_SECONDS = 24 * 3600.0
"""How long jobs that have ended are kept, in seconds during which a server has the journal open."""
BUSY_SECONDS = 2.0
"""How long opening waits for a server that is just ending."""
LOCK_SECONDS = 5.0
"""How long a thread waits for another one that reads or writes; a disk may hang."""
_ENDED_ROW = "state IN ('done', 'failed', 'cancelled')"


class Journal:
    """One file; safe to be called from several threads, used by one process.

    Attributes:
        place: the file.
        unreadable: rows that were marked failed because this version cannot read them.
    """

    def __init__(self, place: Path) -> None:
        """Open or make the file, and upgrade it to this version's schema.

        Raises:
            JournalError: it is not a journal, of a newer version, damaged, in use, or it cannot
                be written. It was not changed then.
        """
        self.place = Path(place).absolute()  # SQLite takes some relative names for other things
        self.unreadable = 0
        self._lock = threading.Lock()
        self._opened = time.monotonic()
        self._clock = 0.0
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            self.place.touch(mode=0o600)  # it holds what people asked for, and their pictures
            check_file(self.place)
            tighten(self.place)
            self.place.open("r+b").close()  # SQLite's own words are "disk I/O error"
            self._base = sqlite3.connect(
                self.place, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None
            )
        except (sqlite3.Error, OSError, ValueError) as error:
            raise unusable(self.place, error) from error
        try:
            self._set_up()
        except sqlite3.Error as error:
            self._base.close()
            raise unusable(self.place, error) from error
        except BaseException:
            self._base.close()
            raise

    def _set_up(self) -> None:
        base = self._base
        # damaged text must not break a query of many rows; `_read` refuses the surrogates
        base.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        # one process alone: two servers would paint the same jobs
        base.execute("PRAGMA locking_mode = EXCLUSIVE")
        version = check_schema(base, self.place)
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = FULL")
        base.execute("PRAGMA foreign_keys = ON")
        base.execute("BEGIN IMMEDIATE")
        try:
            if version < SCHEMA:
                upgrade(base)
            self._clock = read_clock(base)
            base.execute("DELETE FROM clock")
            base.execute("INSERT INTO clock VALUES (?)", (self._clock,))
        except BaseException:
            base.execute("ROLLBACK")
            raise
        base.execute("COMMIT")

    def close(self) -> None:
        """Write everything into the one file."""
        with contextlib.suppress(JournalError), self._transaction():
            self._keep_clock()
        with contextlib.suppress(JournalError), self._hold():
            self._base.close()

    # --- jobs ----------------------------------------------------------------------------------

    def accept(self, job: Job) -> None:
        """Keep a job that is about to be accepted."""
        row = (
            job.id, job.client, job.idempotency, job.sent_digest, job.digest, job.order.as_json(),
            job.accepted,
        )  # fmt: skip
        images = [(job.id, number, one) for number, one in enumerate(job.order.images())]
        with self._transaction() as base:
            base.execute(
                "INSERT INTO jobs (id, client, idempotency, digest, asked_digest, asked, accepted,"
                " state) VALUES (?, ?, ?, ?, ?, ?, ?, 'accepted')",
                row,
            )
            base.executemany("INSERT INTO images VALUES (?, ?, ?)", images)

    def start(self, job: Job) -> None:
        """Note that a worker begins with it."""
        with self._transaction() as base:
            base.execute(
                "UPDATE jobs SET runs = runs + 1, started = ? WHERE id = ?", (job.started, job.id)
            )

    def end(self, job: Job, state: State, error: DanqingError | None = None) -> None:
        """Keep how a job ends, with its pictures, before its client is told. It ends once."""
        rows = [
            (job.id, number, one.output_format, json.dumps(one.record), one.data)
            for number, one in enumerate(job.pictures)
        ]
        why = None if error is None else json.dumps(error_row(error))
        with self._transaction() as base:
            changed = base.execute(
                "UPDATE jobs SET state = ?, finished = ?, error = ?, ended_clock = ?"  # noqa: S608
                f" WHERE id = ? AND NOT {_ENDED_ROW}",
                (state, job.finished or job.now(), why, self._now(), job.id),
            ).rowcount
            if changed:
                base.execute("DELETE FROM images WHERE job = ?", (job.id,))
                base.execute("DELETE FROM pictures WHERE job = ?", (job.id,))
                base.executemany("INSERT INTO pictures VALUES (?, ?, ?, ?, ?)", rows)
            self._keep_clock()

    def forget_old(self, *, older_than: float = KEPT_SECONDS) -> None:
        """Drop jobs that ended long ago, by the journal's clock: the machine's may jump."""
        now = self._now()
        with self._transaction() as base:
            base.execute(
                f"UPDATE jobs SET ended_clock = ? WHERE {_ENDED_ROW} AND"  # noqa: S608
                " (typeof(ended_clock) NOT IN ('real', 'integer') OR ended_clock > ?)",
                (now, now),
            )
            base.execute(
                f"DELETE FROM jobs WHERE {_ENDED_ROW} AND ended_clock < ?",  # noqa: S608
                (now - older_than,),
            )
            self._keep_clock()

    def resume(self) -> list[Job]:
        """Return the jobs of an earlier life of the server that it is to finish; drop old ones."""
        self.forget_old()
        jobs = self.waiting()
        row = {"resumed": len(jobs), "unreadable": self.unreadable}
        if self.unreadable:
            log.error("journal opened; jobs that cannot be read failed", extra={"row": row})
        else:
            log.info("journal opened", extra={"row": row})
        return jobs

    def waiting(self) -> list[Job]:
        """Return the jobs that were accepted and have not ended, in their order.

        A row that cannot be read is marked failed, logged, and counted in `unreadable`.
        """
        with self._reading() as base:
            # by rowid: the machine's clock may have jumped between two of them
            query = f"SELECT rowid FROM jobs WHERE NOT {_ENDED_ROW} ORDER BY rowid"  # noqa: S608
            rows = [row for (row,) in base.execute(query)]
        found = (self._job("rowid = ?", row) for row in rows)
        return [job for job in found if job is not None and not job.ended]

    def by_idempotency(self, client: str, name: str) -> Job | None:
        """Return a client's job by the client's own name of it."""
        return self._job("client = ? AND idempotency = ?", client, name)

    def job(self, name: str) -> Job | None:
        """Return a job by its id; a row that cannot be read is a failed job."""
        return self._job("id = ?", name)

    def _job(self, condition: str, *values: object) -> Job | None:
        with self._reading() as base:
            cursor = base.execute(
                "SELECT rowid, id, client, idempotency, digest, asked_digest, asked, state,"  # noqa: S608
                f" accepted, started, finished, error FROM jobs WHERE {condition}",
                values,
            )
            names = [column[0] for column in cursor.description]
            found = cursor.fetchone()
            if found is None:
                return None
            row = dict(zip(names, found, strict=True))
            number = (row["rowid"],)  # the id may be damaged
            images = base.execute(
                "SELECT data FROM images WHERE job = (SELECT id FROM jobs WHERE rowid = ?)"
                " ORDER BY number",
                number,
            ).fetchall()
            pictures = base.execute(
                "SELECT output_format, record, data FROM pictures"
                " WHERE job = (SELECT id FROM jobs WHERE rowid = ?) ORDER BY number",
                number,
            ).fetchall()
        try:
            return read_job(row, [data for (data,) in images], pictures)
        except Exception as error:  # noqa: BLE001 - damage takes every form
            return self._read_badly(row, error)

    def _read_badly(self, row: dict[str, Any], cause: Exception) -> Job:
        """Return a row that cannot be read as a failed job; mark it so if it has not ended."""
        error = JournalError(
            "the job cannot be read by this version of danqing",
            hint="submit the request again under another Idempotency-Key",
        )
        job = Job(
            id=str(row["id"]),
            client=str(row["client"]),
            idempotency=None if row["idempotency"] is None else str(row["idempotency"]),
            digest=row["asked_digest"] if isinstance(row["asked_digest"], str) else None,
            sent_digest=str(row["digest"]),
            order=Order(model=read_model(row["asked"]), request=Request(prompt="unreadable")),
            state="failed",
            accepted=read_number(row["accepted"]) or 0.0,
            error=error,
        )
        if row["state"] not in ENDED or row["state"] == "given back":
            self.unreadable += 1
            with self._transaction() as base:
                base.execute(
                    "UPDATE jobs SET state = 'failed', finished = ?, ended_clock = ?, error = ?"
                    " WHERE rowid = ?",
                    (time.time(), self._now(), json.dumps(error_row(error)), row["rowid"]),
                )
            # what an error of danqing saw may be the prompt, which logs leave out
            text = cause.what if isinstance(cause, DanqingError) else str(cause)
            why = f"{type(cause).__name__}: {text[:200]}"
            log.error(
                "a job of the journal cannot be read by this version of danqing: it is marked"
                " failed",
                extra={"row": {"job": job.id, "client": job.client, "what": why}},
            )
        return job

    # --- the file ------------------------------------------------------------------------------

    def _now(self) -> float:
        """Return the seconds that servers had this journal open."""
        return self._clock + time.monotonic() - self._opened

    def _keep_clock(self) -> None:
        self._base.execute("UPDATE clock SET seconds = ?", (self._now(),))

    @contextlib.contextmanager
    def _hold(self) -> Iterator[None]:
        """Let one thread at a time use the file.

        Raises:
            JournalBusyError: another one has had it for long.
        """
        if not self._lock.acquire(timeout=LOCK_SECONDS):
            raise JournalBusyError(
                "the journal does not answer",
                seen=f"another job has been read or written for over {LOCK_SECONDS:.0f} s",
                hint="ask again in a moment; the disk may be too slow",
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Read something.

        Raises:
            JournalError: it cannot be read.
        """
        with self._hold():
            try:
                yield self._base
            except sqlite3.Error as error:
                raise _failed("read", error) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write all of something or nothing.

        Raises:
            JournalError: it cannot be written; `JournalFullError` if the disk is full.
        """
        with self._hold():
            try:
                self._base.execute("BEGIN IMMEDIATE")
                yield self._base
                self._base.execute("COMMIT")
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):  # it may have been rolled back already
                    self._base.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise _failed("written", error) from error
                raise


def migrate(place: Path, version: int) -> None:
    """Write a journal in the schema of another version of danqing; its jobs are kept.

    Args:
        place: the file; no server may be using it.
        version: of the schema, from `OLDEST` to `SCHEMA`.

    Raises:
        RequestError: this version of danqing does not know that schema.
        JournalError: the journal cannot be opened or written.
    """
    if not OLDEST <= version <= SCHEMA:
        raise RequestError(
            "unknown version of the journal", seen=version, allowed=f"{OLDEST} to {SCHEMA}"
        )
    if not Path(place).is_file():
        raise RequestError("journal not found", seen=place)
    journal = Journal(place)
    if version < SCHEMA:
        with journal._transaction() as base:  # noqa: SLF001
            # version 1 names the columns it reads, so those that were added may stay
            base.execute("DROP TABLE clock")
            base.execute(f"PRAGMA user_version = {version}")
    journal.close()


def _failed(what: str, error: sqlite3.Error) -> JournalError:
    """Return the error for a client: no path of the server is in it."""
    text = str(error)
    kind = JournalFullError if "full" in text else JournalError
    return kind(f"the journal cannot be {what}", seen=text)
