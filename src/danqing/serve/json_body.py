"""Read the JSON body of a request: one flat object, refused at its first fault."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from danqing.errors import RequestError
from danqing.escaping import escape
from danqing.serve.bodies import EditBody, unknown_parameter

if TYPE_CHECKING:
    from danqing.serve.bodies import Body, Scalar

_MAX_NAME = 80
_MAX_DIGITS = 400
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_CONSTANTS = {"true": True, "false": False, "null": None}
_STRINGS = json.JSONDecoder()


def read_object(data: bytes, kind: type[Body]) -> dict[str, Scalar]:
    """Return the fields of a JSON object that has no objects or arrays in it.

    `json.loads` builds whatever is there before anything can be refused, and holds the interpreter
    meanwhile. This stops at the first field that the body cannot have.

    Args:
        data: the body.
        kind: of which request, for the names of its fields.

    Raises:
        RequestError: the first fault; an unknown field, a field given twice, or an array is one.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _invalid_json(str(error)) from error
    place = _skip(text, 0)
    if text[place : place + 1] != "{":
        if text[place : place + 1] in {*'["-0123456789tfn'} - {""}:
            raise RequestError("the body is not a JSON object", seen=text[place : place + 20])
        raise _invalid_json(_where(text, place))
    fields, place = _read_fields(text, _skip(text, place + 1), kind)
    place = _skip(text, place)
    if place != len(text):
        raise _invalid_json(_where(text, place))
    return fields


def _read_fields(text: str, place: int, kind: type[Body]) -> tuple[dict[str, Scalar], int]:
    """Return the fields, and where the object ends."""
    fields: dict[str, Scalar] = {}
    if text.startswith("}", place):
        return fields, place + 1
    while True:
        name, place = _read_string(text, place, "a field's name")
        if name not in kind.model_fields:
            raise unknown_parameter(name, kind)
        if name in fields:
            raise RequestError(f"duplicate {name}", setting=name)
        place = _skip(text, place)
        if not text.startswith(":", place):
            raise _invalid_json(_where(text, place))
        fields[name], place = _read_value(text, _skip(text, place + 1), name)
        place = _skip(text, place)
        if text.startswith("}", place):
            return fields, place + 1
        if not text.startswith(",", place):
            raise _invalid_json(_where(text, place))
        place = _skip(text, place + 1)


def _skip(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None  # noqa: S101 - it matches nothing, too
    return match.end()


def _read_string(text: str, place: int, name: str) -> tuple[str, int]:
    if text[place : place + 1] != '"':
        raise _invalid_json(_where(text, place))
    try:
        value, place = _STRINGS.raw_decode(text, place)
    except ValueError as error:
        raise _invalid_json(str(error)) from error
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} has half of a surrogate pair",
                seen=f"U+{ord(value[error.start]):04X} at position {error.start}",
                allowed="whole characters",
                setting=name if name in EditBody.model_fields else None,
            ) from error
    return value, place


def _read_value(text: str, place: int, name: str) -> tuple[Scalar, int]:
    first = text[place : place + 1]
    if first == '"':
        return _read_string(text, place, name)
    if first in ("{", "["):
        raise RequestError(
            f"invalid {name}",
            seen="an object" if first == "{" else "an array",
            allowed="a string, a number, true, false or null",
            setting=name,
        )
    for word, value in _CONSTANTS.items():
        if text.startswith(word, place):
            return value, place + len(word)
    match = _NUMBER.match(text, place)
    if match is None:
        raise _invalid_json(_where(text, place))
    if match.end() - place > _MAX_DIGITS:  # converting takes time by the square of the digits
        raise RequestError(
            f"invalid {name}",
            seen=f"a number of {match.end() - place} characters",
            allowed=f"at most {_MAX_DIGITS}",
            setting=name,
        )
    if match[1] is None and match[2] is None:
        return int(match[0]), match.end()
    number = float(match[0])
    # in JSON 5.0 is a whole number, too
    return int(number) if number.is_integer() else number, match.end()


def _invalid_json(seen: str) -> RequestError:
    return RequestError("the body is not valid JSON", seen=escape(seen[:200]))


def _where(text: str, place: int) -> str:
    found = text[place : place + 10]
    return f"{found!r} at position {place}" if found else f"the end at position {place}"
