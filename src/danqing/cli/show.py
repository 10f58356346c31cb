"""`danqing show`: the record a picture carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing.cli.terminal import print_json, print_line
from danqing.pictures import read_record

if TYPE_CHECKING:
    from collections.abc import Iterator


def run(picture: str, *, as_json: bool) -> None:
    """Print the record as text or as JSON."""
    record = read_record(picture)
    if as_json:
        print_json(record, indent=2)
        return
    for label, text in _rows("", record):
        print_line(f"{label:<34} {text}")


def _rows(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the leaves of a record with dotted names."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _rows(f"{prefix}.{name}" if prefix else name, inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _rows(f"{prefix}.{number}", inner)
    elif value is not None:
        yield prefix, str(value)
