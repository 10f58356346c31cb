"""Reads a benchmark's rows: JSON, JSON lines, CSV, Parquet, or a folder of text files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.errors import InstallationError, RequestError
from danqing.files import read_regular
from danqing.references import from_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDED = ("stem", "folder")
"""Keys of each row that tell the file it came from."""
_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".txt")


def read_rows(place: Path, *, within: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of a file, or of all files in a folder in the order of their names.

    Each row also has `stem` and `folder`, of the file it came from.

    Args:
        place: a file or a folder.
        within: key of the list of rows in a JSON file; a file without it has none.

    Raises:
        RequestError: there is nothing to read, or it is of no known form.
    """
    try:
        if place.is_dir():
            files = sorted(path for path in place.rglob("*") if path.suffix in _ENDINGS)
        else:
            files = [place]
        found = [
            {**row, "stem": file.stem, "folder": file.parent.name}
            for file in files
            for row in _read(file, within)
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError("the prompts cannot be read", seen=f"{place}: {error}") from error
    if not found:
        raise RequestError(
            "there are no prompts", seen=place, allowed=", ".join(_ENDINGS) + ", or a folder of it"
        )
    return found


def _read(file: Path, within: str | None) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        yield from _read_parquet(file)
        return
    text = read_regular(file).decode("utf-8-sig")
    if file.suffix == ".csv":
        yield from csv.DictReader(io.StringIO(text))
    elif file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield _table(_json(line, f"{file}, line {number}"), f"{file}, line {number}")
    elif file.suffix == ".json":
        found = _json(text, str(file))
        if within is not None and isinstance(found, dict):
            found = found.get(within, [])
        yield from _rows_of(found, str(file))
    elif file.suffix == ".txt":
        yield {"prompt": next((line.strip() for line in text.splitlines() if line.strip()), "")}
    else:
        raise RequestError(
            "the prompts file is of no known form", seen=file, allowed=", ".join(_ENDINGS)
        )


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise InstallationError(
            "reading a parquet file takes pyarrow", seen=file, hint="pip install pyarrow"
        ) from error
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=8):
            yield from batch.to_pylist()
    except (pa.ArrowException, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError("the parquet file is damaged", seen=f"{file}: {first[:200]}") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError("the prompts are no JSON", seen=f"{where}: {error}") from error


def _rows_of(found: Any, where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a list, of the one list inside a table, or of a table by their keys."""
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        if len(lists) == 1:
            found = lists[0]
        else:
            found = [{"key": key, **_table(row, where)} for key, row in found.items()]
    if not isinstance(found, list):
        raise RequestError("the prompts are no list", seen=f"{where}: {type(found).__name__}")
    for row in found:
        yield _table(row, where)


def _table(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, dict):
        raise RequestError("a row of the prompts is no table", seen=f"{where}: {str(row)[:80]}")
    return row


def picture_of(given: Any, root: Path) -> Any:
    """Return the picture to edit that a row names: a file below `root`, or bytes inside the row."""
    if isinstance(given, dict) and isinstance(given.get("bytes"), bytes):
        given = given["bytes"]
    if isinstance(given, bytes):
        return from_bytes(given)
    if isinstance(given, dict):
        given = given.get("path")
    if not isinstance(given, str) or not given:
        raise RequestError("a row names no picture to edit", seen=str(given)[:80])
    return root / Path(given)
