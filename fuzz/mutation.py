"""Mutates inputs: bytes, JSON values, and files whose header is JSON."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

MAX_BYTES = 1 << 20
NUMBERS = (
    0, 1, -1, 2, 7, 64, 255, 256, 1023, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**53,
    2**63 - 1, 2**63, 2**64, 10**30,
)  # fmt: skip
WORDS = (
    "", "a", "\0", "\n", "\x1b[2J", "\u202e", "\ud800", "\U0001f600", "../../x", "/etc/passwd", "~",
    "~nobody-here/x", "{0.__class__}", "{{7*7}}", "%s%n", "1e999", "-0", "NaN", "None", "true",
    "F32", "BF16", "I64", "x" * 1000, "1x1", "64x64", "999999x1", "a" * 100_000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], {"": {}}, 0.5, -1.5, 1e308, float("nan"), float("inf"),
    *NUMBERS, *WORDS,
)  # fmt: skip
TOKENS = tuple(word.encode("utf-8", "surrogatepass") for word in WORDS if len(word) < 100)


def mutate(data: bytes, kind: str, dice: random.Random, pool: Sequence[bytes]) -> bytes:
    """Return a changed input.

    Args:
        data: the input.
        kind: `bytes`; `json`; `header`, 8 bytes of length and a JSON header; or `prefixed`, one
            byte that chooses and then JSON.
        dice: what decides.
        pool: other inputs, to splice with.
    """
    for _ in range(dice.choice((1, 1, 2, 3, 5))):
        if kind != "bytes" and dice.random() < 0.7:
            data = _mutate_structure(data, kind, dice)
        else:
            data = _mutate_bytes(data, dice, pool)
    return data[:MAX_BYTES]


def _mutate_structure(data: bytes, kind: str, dice: random.Random) -> bytes:
    start = {"json": 0, "header": 8, "prefixed": 1}[kind]
    stop = len(data)
    if kind == "header":
        stop = min(8 + int.from_bytes(data[:8], "little"), len(data))
    try:
        value = json.loads(data[start:stop])
    except (ValueError, RecursionError):
        return data
    text = json.dumps(_mutate_value(value, dice)).encode("utf-8", "surrogatepass")
    if kind == "header":
        return struct.pack("<Q", len(text)) + text + data[stop:]
    return data[:start] + text


def _mutate_value(value: Any, dice: random.Random) -> Any:
    """Change one place within a JSON value."""
    deeper = isinstance(value, (dict, list)) and value and dice.random() < 0.8
    if deeper and isinstance(value, dict):
        return _mutate_table(dict(value), dice)
    if deeper:
        return _mutate_list(list(value), dice)
    if isinstance(value, bool) or value is None or dice.random() < 0.5:
        return dice.choice(VALUES)
    if isinstance(value, (int, float)):
        change = dice.choice((-1, 1, 10, 1000))
        return dice.choice((value + change, value * change, -value, str(value), [value]))
    if isinstance(value, str):
        return dice.choice((value + dice.choice(WORDS), value[:-1], value * 2, [value]))
    return dice.choice(VALUES)


def _mutate_table(value: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    key = dice.choice(list(value))
    action = dice.randrange(8)
    if action == 0:
        del value[key]
    elif action == 1:
        value[dice.choice(WORDS)] = dice.choice(VALUES)
    elif action == 2:
        value[f"{key}{dice.randrange(10)}"] = value[key]
    else:
        value[key] = _mutate_value(value[key], dice)
    return value


def _mutate_list(value: list[Any], dice: random.Random) -> list[Any]:
    place = dice.randrange(len(value))
    action = dice.randrange(8)
    if action == 0:
        del value[place]
    elif action == 1:
        value.insert(place, dice.choice(VALUES))
    elif action == 2:
        value *= dice.choice((2, 10, 1000) if len(value) < 10 else (2,))
    else:
        value[place] = _mutate_value(value[place], dice)
    return value


def _mutate_bytes(data: bytes, dice: random.Random, pool: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    place = dice.randrange(len(changed) + 1)
    length = dice.choice((1, 2, 4, 8, 16, 64))
    action = dice.randrange(9)
    if action == 0 and place < len(changed):
        changed[place] ^= 1 << dice.randrange(8)
    elif action == 1:
        changed[place : place + length] = dice.randbytes(length)
    elif action == 2:
        number = dice.choice(NUMBERS) % 2**64
        form = dice.choice(("<Q", "<I", ">I", "<H", ">H"))
        size = struct.calcsize(form)
        changed[place : place + size] = struct.pack(form, number % 256**size)
    elif action == 3:
        changed[place:place] = dice.choice(TOKENS)
    elif action == 4:
        del changed[place : place + length]
    elif action == 5:
        changed[place:place] = changed[place : place + length] * dice.choice((1, 2, 50))
    elif action == 6:
        del changed[place:]
    elif action == 7 and pool:
        other = dice.choice(pool)
        cut = dice.randrange(len(other) + 1)
        changed[place:] = other[cut:]
    else:
        changed[place : place + 1] = str(dice.choice(NUMBERS)).encode()
    return bytes(changed)
