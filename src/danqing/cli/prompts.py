"""Prompts and sizes, as they are typed or stand in a file."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

from danqing.errors import RequestError
from danqing.files import expand

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SIZE = re.compile(r"(\d{1,6})\s*[xX×*]\s*(\d{1,6})")  # noqa: RUF001 - people paste the real sign


def read_prompts(place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and settings of each line that is not blank.

    A line that begins with `{` is a JSON object with at least a prompt; any other is a prompt.
    """
    try:
        text = sys.stdin.read() if place == "-" else expand(place).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("the prompts file cannot be read", seen=f"{place}: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("{"):
            try:
                yield number, json.loads(stripped)
            except (ValueError, RecursionError) as error:
                raise RequestError(
                    f"{place}, line {number} begins like a JSON object but is none",
                    seen=f"{stripped[:80]} ({error})",
                ) from error
        elif stripped:
            yield number, {"prompt": stripped}


def read_size(size: str | None, settings: Mapping[str, Any]) -> dict[str, int]:
    """Return height and width of a size as it is typed: `768x512`, the width first."""
    if size is None:
        return {}
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise RequestError(
            "the size cannot be read", seen=size, allowed="WIDTHxHEIGHT, such as 768x512"
        )
    found = {"width": int(match[1]), "height": int(match[2])}
    for name, value in found.items():
        if settings.get(name, value) != value:
            raise RequestError(
                f"--size and --{name} contradict each other",
                seen=f"{size} and {settings[name]}",
            )
    return found
