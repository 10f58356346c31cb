"""Escape text that came from outside before it reaches a terminal or a log."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_HARMLESS = frozenset("\n\t\u200c\u200d")
"""Newline, tab, and the two joiners that Persian and emoji are written with."""
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Controls (C0, C1), formats (bidirectional overrides among them), lone surrogates, separators."""


def escape(text: str, *, one_line: bool = False) -> str:
    r"""Return the text with every character that could control a terminal written as an escape.

    A terminal obeys C0 and C1 controls (it sets titles, makes links, clears the screen), and
    bidirectional controls change the order in which text is shown.

    Args:
        text: from a file, a client or the network.
        one_line: escape newlines and tabs, too.

    Returns:
        Printable text; `\x1b`, `\u202e` or `\U000e0041` in place of each such character.
    """
    if text.isascii() and text.isprintable():
        return text
    keep = _HARMLESS - frozenset("\n\t") if one_line else _HARMLESS
    return _written(text, keep, _escape_character)


def _written(text: str, keep: frozenset[str], write: Callable[[str], str]) -> str:
    """Write every character that could control a terminal in another way."""
    return "".join(
        write(character)
        if character not in keep and unicodedata.category(character) in _ESCAPED
        else character
        for character in text
    )


def _escape_character(character: str) -> str:
    code = ord(character)
    if code < 0x100:  # noqa: PLR2004
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"  # noqa: PLR2004


def escape_json(text: str) -> str:
    r"""Return JSON text with the same characters escaped as JSON has it: `\u009b`.

    Args:
        text: valid JSON; it decodes to the same value afterwards.
    """
    if text.isascii():  # JSON itself escapes C0 controls, DEL aside
        return text.replace("\x7f", "\\u007f")
    return _written(text, _HARMLESS, _json_escape)


def _json_escape(character: str) -> str:
    code = ord(character)
    if code < 0x10000:  # noqa: PLR2004
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
