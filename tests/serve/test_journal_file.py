"""A journal's file may be damaged, of another version, shared, full: the server says so or starts."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import sqlite3
import stat
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from danqing.errors import OutputError, RequestError
from danqing.serve.jobs import Job, Order
from danqing.serve.journal import Journal
from tests.fakes import FakeRunner
from tests.serve.asking import connected
from tests.serve.conftest import until
from tests.serve.fakes import make_order, make_service

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION_1 = """
CREATE TABLE jobs (
  id TEXT PRIMARY KEY, client TEXT NOT NULL, idempotency TEXT, digest TEXT NOT NULL,
  asked TEXT NOT NULL, state TEXT NOT NULL, runs INTEGER NOT NULL DEFAULT 0,
  accepted REAL NOT NULL, started REAL, finished REAL, error TEXT,
  UNIQUE (client, idempotency)
);
CREATE TABLE images (
  job TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, number INTEGER NOT NULL, data BLOB NOT NULL,
  PRIMARY KEY (job, number)
);
CREATE TABLE pictures (
  job TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, number INTEGER NOT NULL,
  output_format TEXT NOT NULL, record TEXT NOT NULL, data BLOB NOT NULL,
  PRIMARY KEY (job, number)
);
CREATE INDEX jobs_by_state ON jobs (state, accepted);
PRAGMA user_version = 1;
"""
"""As commit 861a3e6 made it."""
REQUEST: dict[str, Any] = {"prompt": "x", "seed": 1, "height": 64, "width": 64}
ORDER: dict[str, Any] = {
    "model": "fake", "output_format": "png", "quality": None, "previews": 0, "edits": False,
    "user": None, "notes": [], "request": REQUEST,
}  # fmt: skip


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


RECORD = {"picture": {"width": 64, "height": 64}, "stages": [{"name": "denoise", "seconds": 1.0}]}


def write_version_1(place: Path, *, asked: str = json.dumps(ORDER), name: str = "one") -> None:
    """Make a journal of version 1 with a job that waits and one that is done."""
    with sqlite3.connect(place) as base:
        base.executescript(VERSION_1)
        base.execute("PRAGMA journal_mode = WAL")
        base.execute(
            "INSERT INTO jobs (id, client, idempotency, digest, asked, state, accepted)"
            " VALUES (?, 'local', 'waits', 'sent', ?, 'accepted', 1)",
            (name, asked),
        )
        base.execute(
            "INSERT INTO jobs (id, client, idempotency, digest, asked, state, accepted, started,"
            " finished) VALUES ('done', 'local', 'ended', 'sent', ?, 'done', 1, 2, 3)",
            (json.dumps(ORDER),),
        )
        base.execute(
            "INSERT INTO pictures VALUES ('done', 0, 'png', ?, ?)", (json.dumps(RECORD), _png())
        )
    base.close()


def change(place: Path, sql: str, *values: object) -> None:
    with sqlite3.connect(place) as base:
        base.execute(sql, values)
    base.close()


def ask_for(service: Any, *names: str) -> list[tuple[int, Any]]:
    """Return status and JSON of each job."""

    async def run() -> list[tuple[int, Any]]:
        async with connected(service) as client:
            answers = [await client.get(f"/v1/jobs/{name}") for name in names]
        return [(answer.status_code, answer.json()) for answer in answers]

    return asyncio.run(run())


# --- rows that cannot be read --------------------------------------------------------------------

BAD_ORDERS: dict[str, str | bytes | int | None] = {
    "not JSON": "{",
    "empty": "",
    "null": "null",
    "a list": "[]",
    "a number": 5,
    "bytes": b"\xff\xfe",
    "deep": "[" * 100_000,
    "not a number": json.dumps({**ORDER, "quality": float("nan")}),
    "an unknown field": json.dumps({**ORDER, "flavour": 1}),
    "an unknown setting": json.dumps({**ORDER, "request": {**REQUEST, "flavour": 1}}),
    "an image": json.dumps({**ORDER, "request": {**REQUEST, "image": ["/etc/passwd"]}}),
    "no request": json.dumps({name: one for name, one in ORDER.items() if name != "request"}),
    "no notes": json.dumps({name: one for name, one in ORDER.items() if name != "notes"}),
    "a wrong type in the request": json.dumps({**ORDER, "request": {**REQUEST, "seed": "1"}}),
    "a list as request": json.dumps({**ORDER, "request": [1]}),
    **{
        f"{name} {value!r}": json.dumps({**ORDER, name: value})
        for name, value in (
            ("model", 5), ("model", ["a"]), ("output_format", "exe"), ("output_format", []),
            ("quality", "best"), ("quality", 1000), ("previews", -1), ("previews", "many"),
            ("edits", 1), ("user", 5), ("notes", "no"), ("notes", [1]), ("notes", 5),
        )
    },
}  # fmt: skip


@pytest.mark.finding(2)
def test_rows_that_cannot_be_read_fail_and_the_server_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "jobs.db"
    write_version_1(place)
    for number, asked in enumerate(BAD_ORDERS.values()):
        change(
            place,
            "INSERT INTO jobs (id, client, digest, asked, state, accepted)"
            " VALUES (?, 'local', '', ?, 'accepted', 1)",
            f"bad{number}",
            "" if asked is None else asked,
        )
    service = make_service(FakeRunner(), journal=Journal(place))
    good = service.job("one")
    until(lambda: good is not None and good.ended)
    for (status, body), kind in zip(
        ask_for(service, *(f"bad{number}" for number in range(len(BAD_ORDERS)))),
        BAD_ORDERS,
        strict=True,
    ):
        assert (status, body["status"]) == (200, "failed"), kind
        assert "cannot be read by this version of danqing" in body["error"]["message"], kind
    [(_, found)] = ask_for(service, "one")
    assert found["status"] == "done"
    rows = [getattr(record, "row", {}) for record in caplog.records]
    counts = [row["unreadable"] for row in rows if "unreadable" in row]
    assert counts == [len(BAD_ORDERS)]
    service.close()
    with sqlite3.connect(place) as base:
        query = "SELECT count(*) FROM jobs WHERE id LIKE 'bad%' AND state = 'failed'"
        assert base.execute(query).fetchone() == (len(BAD_ORDERS),)
    base.close()
    make_service(FakeRunner(), journal=Journal(place)).close()  # and again


BAD_COLUMNS: dict[str, tuple[str, object]] = {
    "state": ("state", "painting"),
    "state of bytes": ("state", b"\xff"),
    "accepted": ("accepted", "yesterday"),
    "accepted infinite": ("accepted", float("inf")),
    "started": ("started", b"x"),
    "client": ("client", b"local"),
    "digest": ("digest", b"\x00"),
    "name": ("idempotency", b"\xff"),
    "id": ("id", b"\xff\xfe"),
    "id of none": ("id", None),
}


@pytest.mark.finding(2)
@pytest.mark.parametrize("kind", BAD_COLUMNS)
def test_a_damaged_column_fails_its_row_alone(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "jobs.db"
    write_version_1(place, name="bad")
    column, value = BAD_COLUMNS[kind]
    text = "CAST(? AS TEXT)" if isinstance(value, bytes) and kind in {"id", "name"} else "?"
    change(place, f"UPDATE jobs SET {column} = {text} WHERE id = 'bad'", value)  # noqa: S608
    service = make_service(FakeRunner(), journal=Journal(place))
    status, body = ask_for(service, "bad")[0]
    assert (status, body.get("status")) in {(200, "failed"), (404, None)}
    assert (status == 404) == (column in {"id", "client"})
    job = service.submit(make_order(), "local")
    until(lambda: job.state == "done")
    assert ask_for(service, "done")[0][1]["status"] == "done"
    service.close()


@pytest.mark.finding(2)
@pytest.mark.parametrize(
    "data", [b"", b"no image", _png()[:60], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_an_image_that_cannot_be_decoded_fails_its_job_alone(data: bytes, tmp_path: Path) -> None:
    place = tmp_path / "jobs.db"
    write_version_1(place)
    change(place, "INSERT INTO images VALUES ('one', 0, ?)", data)
    service = make_service(FakeRunner(), journal=Journal(place))
    [(status, body)] = ask_for(service, "one")
    assert (status, body["status"]) == (200, "failed")
    service.close()


@pytest.mark.finding(2)
@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM pictures",
        "UPDATE pictures SET record = '{'",
        "UPDATE pictures SET record = '{}'",
        """UPDATE pictures SET record = '{"picture": {"width": NaN, "height": 64}, "stages": []}'""",
        "UPDATE pictures SET data = x'00'",
        "UPDATE pictures SET data = 'text'",
        "UPDATE pictures SET output_format = 'exe'",
        "UPDATE pictures SET output_format = 5",
        "UPDATE jobs SET asked = '{' WHERE id = 'done'",
        "UPDATE jobs SET state = 'failed' WHERE id = 'done'",
        "UPDATE jobs SET state = 'failed', error = '{' WHERE id = 'done'",
        "UPDATE jobs SET state = 'failed', error = '[]' WHERE id = 'done'",
    ],
)
def test_an_ended_job_that_cannot_be_read_is_reported_as_failed(sql: str, tmp_path: Path) -> None:
    place = tmp_path / "jobs.db"
    write_version_1(place)
    change(place, sql)
    service = make_service(FakeRunner(), journal=Journal(place))
    [(status, body)] = ask_for(service, "done")
    assert (status, body["status"]) == (200, "failed")
    assert "cannot be read" in body["error"]["message"]
    service.close()


# --- versions ------------------------------------------------------------------------------------


@pytest.mark.finding(2)
def test_a_journal_of_version_1_is_upgraded_with_its_jobs(tmp_path: Path) -> None:
    place = tmp_path / "jobs.db"
    write_version_1(place)
    service = make_service(FakeRunner(), journal=Journal(place))
    job = service.job("one")
    assert job is not None
    until(lambda: job.ended)
    assert job.state == "done"
    [(_, done)] = ask_for(service, "done")
    assert done["status"] == "done"
    assert len(done["result"]["data"]) == 1
    # its names still stand for the same requests, by the digest of version 1
    order = make_order()
    for name, wanted in (("waits", "one"), ("ended", "done")):
        found = service.submit(order, "local", idempotency=name, digest="new", sent_digest="sent")
        assert found.id == wanted
        with pytest.raises(RequestError, match="another request"):
            service.submit(order, "local", idempotency=name, digest="new", sent_digest="other")
    service.close()
    with sqlite3.connect(place) as base:
        assert base.execute("PRAGMA user_version").fetchone() == (2,)
    base.close()


def test_a_journal_goes_down_to_version_1_and_up_again(tmp_path: Path) -> None:
    from danqing.serve.journal import migrate

    place = tmp_path / "jobs.db"
    journal = Journal(place)
    waiting = Job(order=make_order(), client="local", idempotency="x", digest="a")
    waiting.sent_digest = "sent"
    journal.accept(waiting)
    ended = Job(order=make_order(), client="local", idempotency="y")
    journal.accept(ended)
    journal.end(ended, "cancelled", RequestError("no"))
    journal.close()
    migrate(place, 1)
    with sqlite3.connect(place) as base, sqlite3.connect(":memory:") as other:
        assert base.execute("PRAGMA user_version").fetchone() == (1,)
        other.executescript(VERSION_1)
        query = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        tables = [name for (name,) in other.execute(query)]
        assert [name for (name,) in base.execute(query)] == tables
        for table in tables:
            columns = [row[1:] for row in other.execute(f"PRAGMA table_info({table})")]
            there = [row[1:] for row in base.execute(f"PRAGMA table_info({table})")]
            assert there[: len(columns)] == columns
        # what version 1 reads and writes
        [row] = base.execute(
            "SELECT client, idempotency, digest, asked, state, accepted, started, finished,"
            " error FROM jobs WHERE id = ?",
            (waiting.id,),
        )
        assert row[1:5] == ("x", "sent", waiting.order.as_json(), "accepted")
        base.execute(
            "INSERT INTO jobs (id, client, idempotency, digest, asked, accepted, state)"
            " VALUES ('old', 'local', 'z', 'sent', ?, 1, 'accepted')",
            (json.dumps(ORDER),),
        )
    base.close()
    other.close()
    journal = Journal(place)
    assert [one.id for one in journal.waiting()] == [waiting.id, "old"]
    kept = journal.job(waiting.id)
    assert kept is not None
    assert (kept.digest, kept.sent_digest) == ("a", "sent")
    assert journal.job(ended.id) is not None
    journal.forget_old(older_than=-1)
    assert journal.job(ended.id) is None
    journal.close()
    for version in (0, 3):
        with pytest.raises(RequestError, match="unknown version"):
            migrate(place, version)
    with pytest.raises(RequestError, match="journal not found"):
        migrate(tmp_path / "none.db", 1)


def test_a_journal_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "jobs.db"
    write_version_1(place)
    change(place, "ALTER TABLE jobs ADD COLUMN flavour TEXT")
    change(place, "PRAGMA user_version = 99")
    before = place.read_bytes()
    with pytest.raises(OutputError, match="newer version of danqing") as caught:
        Journal(place)
    text = str(caught.value)
    assert "99" in text
    assert "1 to 2" in text
    assert "was not changed" in text
    assert place.read_bytes() == before


@pytest.mark.parametrize("statements", [1, 2, 3])
def test_a_journal_whose_making_was_interrupted_is_made(statements: int, tmp_path: Path) -> None:
    place = tmp_path / "jobs.db"
    with sqlite3.connect(place) as base:
        for statement in VERSION_1.split(";")[:statements]:
            base.execute(statement)
    base.close()
    journal = Journal(place)
    journal.accept(Job(order=make_order(), client="anna"))
    journal.close()


# --- files ---------------------------------------------------------------------------------------


def _text(place: Path) -> None:
    place.write_bytes(b"no database" * 1000)


def _short(place: Path) -> None:
    place.write_bytes(b"x")


def _cut(place: Path) -> None:
    write_version_1(place)
    place.write_bytes(place.read_bytes()[:5000])


def _scribbled(place: Path) -> None:
    write_version_1(place)
    data = place.read_bytes()
    place.write_bytes(data[:100] + b"\xff" * 4000 + data[4100:])


def _other(place: Path) -> None:
    with sqlite3.connect(place) as base:
        base.execute("CREATE TABLE bookmarks (id INTEGER)")
    base.close()


def _dropped(place: Path) -> None:
    write_version_1(place)
    change(place, "DROP TABLE pictures")


def _dropped_jobs(place: Path) -> None:
    Journal(place).close()
    change(place, "DROP TABLE jobs")


def _without_column(place: Path) -> None:
    write_version_1(place)
    change(place, "ALTER TABLE jobs RENAME COLUMN accepted TO taken")


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (_text, "not an SQLite database"),
    "one byte": (_short, "not an SQLite database"),
    "cut off": (_cut, "malformed"),
    "scribbled over": (_scribbled, "malformed"),
    "another program's": (_other, "another program, with the table 'bookmarks'"),
    "a dropped table": (_dropped, "missing table pictures"),
    "a dropped table of jobs": (_dropped_jobs, "missing table jobs"),
    "a missing column": (_without_column, "missing column jobs.accepted"),
    "a folder": (Path.mkdir, "a folder"),
    "a named pipe": (os.mkfifo, "a named pipe"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_journal_is_a_clear_error(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "jobs.db"
    make, text = BAD_FILES[kind]
    make(place)
    with pytest.raises(OutputError, match="the journal") as caught:
        Journal(place)
    assert text in str(caught.value)
    assert str(place) in str(caught.value)
    assert caught.value.exit_code == 7


def test_a_journal_that_may_not_be_written(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp())  # of a place that others can reach, too
    place = folder / "jobs.db"
    Journal(place).close()
    folder.chmod(0o755)
    place.chmod(0o444)
    was = os.geteuid()
    try:
        if was == 0:
            os.chown(place, 65534, 65534)
            os.seteuid(65534)
        with pytest.raises(OutputError, match="cannot be used") as caught:
            Journal(place)
    finally:
        os.seteuid(was)
        shutil.rmtree(folder)
    assert "Permission denied" in str(caught.value)


def test_a_full_disk_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def full(*given: Any, **named: Any) -> sqlite3.Connection:
        base: sqlite3.Connection = connect(*given, **named)
        base.execute("PRAGMA max_page_count = 2")  # as on a disk that is full
        return base

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(OutputError, match="free some space"):
        Journal(tmp_path / "jobs.db")


def test_a_journal_in_use(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "jobs.db")
    with pytest.raises(OutputError, match="another server is using it"):
        Journal(tmp_path / "jobs.db")
    journal.close()


def test_names_that_sqlite_takes_for_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (":memory:", "file:x?mode=memory"):
        journal = Journal(Path(name))
        job = Job(order=make_order(), client="anna")
        journal.accept(job)
        journal.close()
        journal = Journal(Path(name))
        assert journal.job(job.id) is not None
        journal.close()


@pytest.mark.finding(13)
def test_only_its_owner_may_read_a_journal_that_was_there(tmp_path: Path) -> None:
    place = tmp_path / "jobs.db"
    write_version_1(place)
    copy = tmp_path / "copy"
    with sqlite3.connect(place) as base:
        base.execute("UPDATE jobs SET runs = 1")
        base.commit()
        for suffix in ("", "-wal", "-shm"):  # as after a crash
            shutil.copy(f"{place}{suffix}", f"{copy}{suffix}")
    base.close()
    for suffix in ("", "-wal", "-shm"):
        Path(f"{copy}{suffix}").chmod(0o644)
    journal = Journal(copy)
    files = sorted(tmp_path.glob("copy*"))
    assert len(files) > 1
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    journal.accept(Job(order=make_order(), client="anna"))
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("copy*")} == {0o600}
    journal.close()


# --- at run time ---------------------------------------------------------------------------------


@pytest.mark.finding(2)
def test_a_table_dropped_at_run_time_is_a_clear_error(tmp_path: Path) -> None:
    gate = threading.Event()
    journal = Journal(tmp_path / "jobs.db")
    service = make_service(FakeRunner(gate), journal=journal)
    running = service.submit(make_order(), "local")
    until(lambda: running.state == "running")
    with journal._lock:  # within the worker's transaction, its rollback would bring them back
        for table in ("pictures", "images", "jobs"):
            journal._base.execute(f"DROP TABLE {table}")

    async def run() -> list[tuple[int, str]]:
        async with connected(service) as client:
            answers = [
                await client.get("/v1/jobs/none"),
                await client.delete("/v1/jobs/none"),
                await client.post(
                    "/v1/images/generations",
                    json={"prompt": "x", "size": "64x64", "seed": 1},
                    headers={"idempotency-key": "x"},
                ),
            ]
        return [(answer.status_code, answer.text) for answer in answers]

    for status, text in asyncio.run(run()):
        assert status == 500
        assert json.loads(text)["error"]["code"] == "journal_failed"
        assert str(tmp_path) not in text
        assert "bug" not in text
    gate.set()
    until(lambda: running.ended)
    assert running.state == "done"
    service.close()


def test_a_full_disk_at_run_time_is_507_without_a_path(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "jobs.db")
    service = make_service(FakeRunner(), journal=journal)
    journal._base.execute("PRAGMA max_page_count = 1")

    async def run() -> Any:
        async with connected(service) as client:
            body = {"prompt": "x" * 8000, "size": "64x64", "seed": 1}
            return await client.post("/v1/images/generations", json=body)

    answer = asyncio.run(run())
    assert answer.status_code == 507
    assert answer.json()["error"]["code"] == "journal_full"
    assert str(tmp_path) not in answer.text
    service.close()


def test_a_failed_write_leaves_no_transaction_open(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "jobs.db")
    job = Job(order=make_order(), client="anna")
    job.accepted = 10**30
    with pytest.raises(OverflowError):
        journal.accept(job)
    good = Job(order=Order(model="fake", request=make_order().request), client="anna")
    journal.accept(good)
    assert [one.id for one in journal.waiting()] == [good.id]
    journal.close()
