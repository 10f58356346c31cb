"""Rows of the journal: a job as it was written, distrusted when it is read."""

from __future__ import annotations

import io
import json
import math
from typing import TYPE_CHECKING, Any

from danqing.errors import BrokenPictureError, DanqingError
from danqing.serve.jobs import Job, Painted, read_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from danqing.serve.jobs import State

_OPEN = ("accepted", "queued", "running", "given back")
"""States of a row that has not ended; danqing itself writes the first alone."""


def read_job(row: Mapping[str, Any], images: list[bytes], pictures: list[tuple[Any, ...]]) -> Job:
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
        accepted=_require(read_number, row["accepted"]),
        started=None if row["started"] is None else _require(read_number, row["started"]),
        finished=None if row["finished"] is None else _require(read_number, row["finished"]),
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
        _require(read_number, stage["seconds"])
        if not isinstance(stage["name"], str):
            raise TypeError("invalid stage")
    return picture


def _read_json(text: str) -> Any:
    def refuse(name: str) -> float:
        raise ValueError(name)

    found = json.loads(text, parse_constant=refuse)
    json.dumps(found, ensure_ascii=False).encode()  # as it is sent: no lone surrogates
    return found


def read_model(asked: Any) -> str:
    """Return the model's name in what was asked, if that can be read."""
    try:
        name = _read_json(asked)["model"]
    except Exception:  # noqa: BLE001 - damage takes every form
        return "unknown"
    return name if isinstance(name, str) else "unknown"


def read_number(value: Any) -> float | None:
    """Return a finite number, or None if it is anything else."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _require(read: Callable[[Any], float | None], value: Any) -> float:
    found = read(value)
    if found is None:
        raise TypeError(f"invalid number {str(value)[:40]!r}")
    return found


def error_row(error: DanqingError) -> dict[str, str | None]:
    """Return an error as it is kept: its class and its four parts."""
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
