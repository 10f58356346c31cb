"""The journal's file: an SQLite database with the schema of a known version."""

from __future__ import annotations

import contextlib
import logging
import stat
from typing import TYPE_CHECKING

from danqing.errors import JournalError
from danqing.files import open_regular
from danqing.serve.journal_rows import read_number

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from danqing.errors import DanqingError

log = logging.getLogger("danqing.serve")

SCHEMA = 2
OLDEST = 1
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


def check_file(place: Path) -> None:
    """See that a file is empty, or an SQLite database; opening a named pipe could block."""
    with open_regular(place) as file:
        head = file.read(len(_MAGIC))
    if head not in (b"", _MAGIC):
        raise JournalError(
            "the journal cannot be used",
            seen=f"{place}: the file is not an SQLite database",
            allowed="a journal of danqing, or the name of a new file",
        )


def tighten(place: Path) -> None:
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


def check_schema(base: sqlite3.Connection, place: Path) -> int:
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


def upgrade(base: sqlite3.Connection) -> None:
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


def read_clock(base: sqlite3.Connection) -> float:
    """Return the seconds that servers had this journal open; 0 in a new or damaged one."""
    row = base.execute("SELECT seconds FROM clock").fetchone()
    return max(0.0, read_number(row[0]) or 0.0) if row else 0.0


def unusable(place: Path, error: Exception) -> DanqingError:
    """Return the error of a file that SQLite or the system cannot open."""
    text = str(error)
    hint = "is it readable and writable for this user, and on a local disk?"
    if "locked" in text:
        hint = "another server is using it: stop that one, or name another file"
    elif "full" in text or "No space" in text:
        hint = "free some space, or name a file on another disk"
    elif "malformed" in text or "not a database" in text:
        hint = "restore the file from a backup, or move it away and start with a new one"
    return JournalError("the journal cannot be used", seen=f"{place}: {text}", hint=hint)
