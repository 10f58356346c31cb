"""Quantities as people read them."""

from __future__ import annotations

import re


def size(count: int) -> str:
    """Return bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:  # noqa: PLR2004
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count = count / 1024  # type: ignore[assignment]
    return f"{count:.2f} GiB"


_UNITS = {
    "": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9,
    "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip


_MAX_DIGITS = 30
"""A number of bytes has fewer; a float of 309 digits is infinite."""


def parse_size(text: str) -> int | None:
    """Return the bytes that a text such as `8GiB`, `7.5 GiB` or `8000MB` means, or None."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or len(match[1]) > _MAX_DIGITS:
        return None
    return int(float(match[1]) * unit)
