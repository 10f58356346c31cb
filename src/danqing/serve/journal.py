"""The journal: accepted jobs and their pictures in an SQLite file, so that they outlive a crash.

A job is in it before its client is told that it was accepted; its pictures and its end are written
in one transaction. What was accepted and had not ended is painted after a restart.

The schema has a version (`PRAGMA user_version`). A journal of an older version is upgraded when it
is opened; `migrate` writes it for an older danqing. A journal of a newer version is left alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import sqlite3
import stat
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.errors import (
    BrokenPictureError,
    DanqingError,
    JournalBusyError,
    JournalError,
    JournalFullError,
    RequestError,
)
from danqing.files import open_regular
from danqing.request import Request
from danqing.serve.jobs import ENDED, Job, Order, Painted, read_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from danqing.serve.jobs import State

log = logging.getLogger("danqing.serve")

SCHEMA = 2
OLDEST = 1
KEPT_SECONDS = 24 * 3600.0
"""How long jobs that have ended are kept, in seconds during which a server has the journal open."""
BUSY_SECONDS = 2.0
"""How long opening waits for a server that is just ending."""
LOCK_SECONDS = 5.0
"""How long a thread waits for another one that reads or writes; a disk may hang."""
_MAGIC = b"SQLite format 3\0"
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
"""Version 1. Later versions add to it, so that version 1 can read what they leave."""
_ADDED_COLUMNS = (("asked_digest", "TEXT"), ("ended_clock", "REAL"))
"""Version 2 adds them to jobs: the digest of what was asked, and when a job ended by the clock."""
_COLUMNS = {
    "jobs": frozenset({
        "id", "client", "idempotency", "digest", "asked", "state", "runs", "accepted", "started",
        "finished", "error",
    }),
    "images": frozenset({"job", "number", "data"}),
    "pictures": frozenset({"job", "number", "output_format", "record", "data"}),
}  # fmt: skip
_COLUMNS_2 = {
    **_COLUMNS,
    "jobs": _COLUMNS["jobs"] | {name for name, _ in _ADDED_COLUMNS},
    "clock": frozenset({"seconds"}),
}
_ENDED_ROW = "state IN ('done', 'failed', 'cancelled')"
_OPEN = ("accepted", "queued", "running", "given back")
"""States of a row that has not ended; danqing itself writes the first alone."""


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
            _check_file(self.place)
            _tighten(self.place)
            self.place.open("r+b").close()  # SQLite's own words are "disk I/O error"
            self._base = sqlite3.connect(
                self.place, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None
            )
        except (sqlite3.Error, OSError, ValueError) as error:
            raise _unusable(self.place, error) from error
        try:
            self._set_up()
        except sqlite3.Error as error:
            self._base.close()
            raise _unusable(self.place, error) from error
        except BaseException:
            self._base.close()
            raise

    def _set_up(self) -> None:
        base = self._base
        # damaged text must not break a query of many rows; `_read` refuses the surrogates
        base.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        # one process alone: two servers would paint the same jobs
        base.execute("PRAGMA locking_mode = EXCLUSIVE")
        version = _check_schema(base, self.place)
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = FULL")
        base.execute("PRAGMA foreign_keys = ON")
        base.execute("BEGIN IMMEDIATE")
        try:
            if version < SCHEMA:
                _upgrade(base)
            self._clock = _read_clock(base)
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
        why = None if error is None else json.dumps(_as_row(error))
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
            return _read(row, [data for (data,) in images], pictures)
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
            order=Order(model=_read_model(row["asked"]), request=Request(prompt="unreadable")),
            state="failed",
            accepted=_number(row["accepted"]) or 0.0,
            error=error,
        )
        if row["state"] not in ENDED or row["state"] == "given back":
            self.unreadable += 1
            with self._transaction() as base:
                base.execute(
                    "UPDATE jobs SET state = 'failed', finished = ?, ended_clock = ?, error = ?"
                    " WHERE rowid = ?",
                    (time.time(), self._now(), json.dumps(_as_row(error)), row["rowid"]),
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


# --- opening -------------------------------------------------------------------------------------


def _check_file(place: Path) -> None:
    """See that a file is empty, or an SQLite database; opening a named pipe could block."""
    with open_regular(place) as file:
        head = file.read(len(_MAGIC))
    if head not in (b"", _MAGIC):
        raise JournalError(
            "the journal cannot be used",
            seen=f"{place}: the file is not an SQLite database",
            allowed="a journal of danqing, or the name of a new file",
        )


def _tighten(place: Path) -> None:
    """Let only the owner read the journal and the files SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        path = place.with_name(place.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            mode = stat.S_IMODE(path.stat().st_mode)
            if not mode & 0o077:
                continue
            try:
                path.chmod(mode & 0o700)
            except PermissionError:  # another owner's, or a file system without modes
                log.warning("others can read the journal", extra={"row": {"mode": f"{mode:04o}"}})


def _check_schema(base: sqlite3.Connection, place: Path) -> int:
    """Return the schema's version, 0 for a new file; see that it has what that version has."""
    version = int(base.execute("PRAGMA user_version").fetchone()[0])
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    tables = {name for (name,) in base.execute(query)}
    if version == 0 and not tables:
        return 0
    if not 0 <= version <= SCHEMA:
        raise JournalError(
            "the journal was written by a newer version of danqing",
            seen=f"{place}: schema version {version}",
            allowed=f"schema version {OLDEST} to {SCHEMA}",
            hint="upgrade danqing, or let the newer one write it for this one (see 'The journal' in"
            " the guide to serving); the journal was not changed",
        )
    if version == 0 and tables <= set(_COLUMNS):
        return 0  # version 1 was killed while it made the tables
    if version == 0:
        raise JournalError(
            "the journal cannot be used",
            seen=f"{place}: an SQLite database of another program, with the table"
            f" {min(tables)[:40]!r}",
            allowed="a journal of danqing, or the name of a new file",
        )
    for table, columns in (_COLUMNS if version == 1 else _COLUMNS_2).items():
        there = {row[1] for row in base.execute(f"PRAGMA table_info({table})")}
        if missing := sorted(columns - there):
            what = f"column {table}.{missing[0]}" if there else f"table {table}"
            raise JournalError(
                "the journal is damaged",
                seen=f"{place}: missing {what} of schema version {version}",
                hint="restore the file from a backup, or move it away and start with a new one",
            )
    return version


def _upgrade(base: sqlite3.Connection) -> None:
    """Bring the tables of any older version to this version's schema, in a transaction."""
    for statement in filter(str.strip, _TABLES.split(";")):
        base.execute(statement)
    there = {row[1] for row in base.execute("PRAGMA table_info(jobs)")}
    for name, kind in _ADDED_COLUMNS:
        if name not in there:
            base.execute(f"ALTER TABLE jobs ADD COLUMN {name} {kind}")
    # it may have been at this version before: that clock is gone
    base.execute("UPDATE jobs SET ended_clock = NULL")
    base.execute("CREATE TABLE IF NOT EXISTS clock (seconds REAL NOT NULL)")
    base.execute(f"PRAGMA user_version = {SCHEMA}")


def _read_clock(base: sqlite3.Connection) -> float:
    row = base.execute("SELECT seconds FROM clock").fetchone()
    return max(0.0, _number(row[0]) or 0.0) if row else 0.0


def _unusable(place: Path, error: Exception) -> DanqingError:
    text = str(error)
    hint = "is it readable and writable for this user, and on a local disk?"
    if "locked" in text:
        hint = "another server is using it: stop that one, or name another file"
    elif "full" in text or "No space" in text:
        hint = "free some space, or name a file on another disk"
    elif "malformed" in text or "not a database" in text:
        hint = "restore the file from a backup, or move it away and start with a new one"
    return JournalError("the journal cannot be used", seen=f"{place}: {text}", hint=hint)


def _failed(what: str, error: sqlite3.Error) -> JournalError:
    """Return the error for a client: no path of the server is in it."""
    text = str(error)
    kind = JournalFullError if "full" in text else JournalError
    return kind(f"the journal cannot be {what}", seen=text)


# --- rows ----------------------------------------------------------------------------------------


def _read(row: Mapping[str, Any], images: list[bytes], pictures: list[tuple[Any, ...]]) -> Job:
    """Return the job of a row.

    Raises:
        Exception: of any kind, if something in it is not what this version writes.
    """
    texts = ["id", "client", "digest", "asked", "state"]
    texts += [name for name in ("idempotency", "asked_digest", "error") if row[name] is not None]
    for name in texts:
        if not isinstance(row[name], str):
            raise TypeError(f"invalid {name}")
        row[name].encode()  # damaged text became surrogates
    states: dict[str, State] = {"done": "done", "failed": "failed", "cancelled": "cancelled"}
    states |= dict.fromkeys(_OPEN, "queued")
    state = states[row["state"]]
    job = Job(
        id=row["id"],
        client=row["client"],
        idempotency=row["idempotency"],
        digest=row["asked_digest"],
        sent_digest=row["digest"],
        order=read_order(row["asked"], images),
        state=state,
        accepted=_require(_number, row["accepted"]),
        started=None if row["started"] is None else _require(_number, row["started"]),
        finished=None if row["finished"] is None else _require(_number, row["finished"]),
        error=None if row["error"] is None else _read_error(_read_json(row["error"])),
        pictures=[] if state == "queued" else [_read_picture(*one) for one in pictures],
    )
    if state == "done" and len(job.pictures) != job.order.request.num_images_per_prompt:
        raise ValueError("images are missing")
    if state in {"failed", "cancelled"} and job.error is None:
        raise ValueError("the error is missing")
    return job


def _read_picture(output_format: Any, record: Any, data: Any) -> Painted:
    from PIL import Image

    picture = Painted(output_format=output_format, record=_read_json(record), data=data)
    with Image.open(io.BytesIO(data), formats=(output_format.upper(),)) as image:
        size = f"{image.width}x{image.height}"
        image.verify()
    if picture.size != size:
        raise ValueError("the record is of another image")
    for stage in picture.record["stages"]:
        _require(_number, stage["seconds"])
        if not isinstance(stage["name"], str):
            raise TypeError("invalid stage")
    return picture


def _read_json(text: str) -> Any:
    def refuse(name: str) -> float:
        raise ValueError(name)

    found = json.loads(text, parse_constant=refuse)
    json.dumps(found, ensure_ascii=False).encode()  # as it is sent: no lone surrogates
    return found


def _read_model(asked: Any) -> str:
    """Return the model's name in what was asked, if that can be read."""
    try:
        name = _read_json(asked)["model"]
    except Exception:  # noqa: BLE001 - damage takes every form
        return "unknown"
    return name if isinstance(name, str) else "unknown"


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _require(read: Callable[[Any], float | None], value: Any) -> float:
    found = read(value)
    if found is None:
        raise TypeError(f"invalid number {str(value)[:40]!r}")
    return found


def _as_row(error: DanqingError) -> dict[str, str | None]:
    return {
        "class": type(error).__name__,
        "what": error.what,
        "seen": error.seen,
        "allowed": error.allowed,
        "hint": error.hint,
    }


def _read_error(row: dict[str, str | None]) -> DanqingError:
    for name in ("class", "what", "seen", "allowed", "hint"):
        if not isinstance(row[name], (str, type(None))):
            raise TypeError(f"invalid error: {name}")
    kinds = {kind.__name__: kind for kind in _kinds(DanqingError)}
    kind = kinds.get(row["class"] or "", BrokenPictureError)
    return kind(row["what"] or "", seen=row["seen"], allowed=row["allowed"], hint=row["hint"])


def _kinds(kind: type[DanqingError]) -> Iterator[type[DanqingError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)
