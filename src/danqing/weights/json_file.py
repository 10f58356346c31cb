"""JSON files of a model folder, read without trusting them: bounded in bytes, values and depth."""

from __future__ import annotations

import gc
import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

from danqing.errors import CheckpointDamagedError, CheckpointIncompleteError
from danqing.files import read_regular

if TYPE_CHECKING:
    from pathlib import Path

MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_TOKENIZER_BYTES = 64 << 20
MAX_CONFIG_VALUES = 200_000
MAX_VALUES = 1_500_000
MAX_TABLES = 400_000
"""Values of a large file, and the tables and lists among them: Qwen2.5's tokenizer.json has about
600,000, of which 151,000 are lists."""
MAX_DEPTH = 64
MAX_DIGITS = 40
"""Digits of a whole number; tokenizers write 10**30 where a length has no limit."""


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds a table.

    Args:
        path: of the file.
        limit: the most bytes it may have.

    Raises:
        CheckpointIncompleteError: the file is missing.
        CheckpointDamagedError: it is not a regular file, too large, or not a JSON table.
    """
    try:
        return parse_table(read_regular(path, limit), limit)
    except FileNotFoundError as error:
        raise CheckpointIncompleteError("a config file is missing", seen=path) from error
    except OSError as error:
        raise CheckpointDamagedError(
            "a config file cannot be read", seen=f"{path}: {error.strerror or error}"
        ) from error
    except ValueError as error:
        raise CheckpointDamagedError(
            "a config file cannot be read", seen=f"{path}: {str(error)[:200]}"
        ) from error


def parse_table(data: bytes, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the table in a JSON text.

    Raises:
        ValueError: it is not valid JSON, holds something else, or is beyond the limits above.
    """
    if len(data) > limit:
        msg = f"the text has more than {limit} bytes"
        raise ValueError(msg)
    refuse_many_values(data, MAX_VALUES if limit > MAX_CONFIG_BYTES else MAX_CONFIG_VALUES)
    try:
        table = load(
            data.decode("utf-8-sig"),
            parse_constant=_refuse_constant,
            parse_int=_whole,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if not isinstance(table, dict):
        msg = f"the file holds a {type(table).__name__} in place of a table"
        raise ValueError(msg)  # noqa: TRY004 - every fault of a file is a ValueError
    _check_values(table)
    return table


def load(text: str, **parsers: Any) -> Any:
    """Parse a text; without collecting garbage, which takes longer than parsing a large one.

    Args:
        text: in JSON.
        parsers: as `json.loads` takes them.

    Raises:
        ValueError: it is not valid JSON, or a name appears twice.
        RecursionError: it is nested too deep.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, **parsers)
    finally:
        if collects:
            gc.enable()


def refuse_many_values(data: bytes, most: int) -> None:
    """Count the values of a JSON text before any is made: each takes far more memory than text.

    Raises:
        ValueError: there are more than `most`.
    """
    tables = data.count(b"[") + data.count(b"{")
    if data.count(b",") + tables > most or tables > max(MAX_TABLES, most // 2):
        msg = f"the text has more than {most} values"
        raise ValueError(msg)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a table from pairs whose names all differ.

    Raises:
        ValueError: a name appears twice: readers disagree on which value is meant.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        names = set()
        for name, _ in pairs:
            if name in names:
                msg = f"the name {name[:100]!r} appears twice"
                raise ValueError(msg)
            names.add(name)
    return table


_TOO_DEEP = f"the values are nested more than {MAX_DEPTH} deep"


def _refuse_constant(text: str) -> NoReturn:
    msg = f"{text} is not a JSON number"
    raise ValueError(msg)


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        msg = f"a whole number has {len(text)} digits"
        raise ValueError(msg)
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        msg = f"a number is too large: {text[:100]}"
        raise ValueError(msg)
    return value


def _check_values(table: dict[str, Any]) -> None:
    """Refuse what breaks later readers: deep nesting, and halves of characters."""
    level: list[Any] = [table]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for name in value:
                    _check_text(name)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, str):
                _check_text(value)
        if not below:
            return
        level = below
    raise ValueError(_TOO_DEEP)


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            msg = f"a text holds half of a character: {text[:100]!a}"
            raise ValueError(msg) from error
