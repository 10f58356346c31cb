"""Read the multipart form of an edit: text fields and the files of its images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from danqing.errors import NoEffectError, RequestError
from danqing.request import MAX_IMAGES
from danqing.serve.bodies import MAX_FIELDS, MAX_NAME, unknown_parameter

if TYPE_CHECKING:
    from danqing.serve.bodies import Body

_MAX_FIELD_BYTES = 64 << 10
"""Of a form's text field: the longest prompt, four bytes a character, and some to spare."""
_MAX_HEADER_BYTES = 4 << 10
_WINDOW = 1 << 20
_BOUNDARY = re.compile(
    r"(?i:multipart/form-data)\s*;(?:.*;)?\s*(?i:boundary)="
    r"(?:\"([0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-])\"|([0-9A-Za-z'+_.-]{1,70}))"
    r"\s*(?:;.*)?"
)
_OPTION = re.compile(r";[ \t]*([A-Za-z*]+)=(?:\"((?:\\.|[^\"\\])*)\"|([^\s;\"]*))")


@dataclass(frozen=True)
class Part:
    """One part of a form.

    Attributes:
        name: of its field.
        is_file: it has a file name.
        data: its bytes, a view of the body.
    """

    name: str
    is_file: bool
    data: memoryview


def split_form(body: bytes | bytearray, content_type: str) -> list[Part]:
    """Return the parts of a multipart form (RFC 7578), without copying any.

    Args:
        body: whole.
        content_type: the header, which names the boundary.

    Raises:
        RequestError: it is not such a form, or has too many parts.
    """
    match = _BOUNDARY.fullmatch(content_type.strip())
    if match is None:
        raise _invalid_form("no boundary of 1 to 70 characters in the Content-Type")
    mark = b"--" + (match[1] or match[2]).encode()
    view = memoryview(body)
    parts: list[Part] = []
    place = 2 if body.startswith(b"\r\n" + mark) else 0
    if not body.startswith(mark, place):
        raise _invalid_form("it does not begin with its boundary")
    place += len(mark)
    while not body.startswith(b"--", place):
        if not body.startswith(b"\r\n", place):
            raise _invalid_form(f"no line break after the boundary at byte {place}")
        if len(parts) == MAX_FIELDS:
            raise _invalid_form(f"more than {MAX_FIELDS} parts")
        end = body.find(b"\r\n\r\n", place, place + _MAX_HEADER_BYTES)
        if end < 0:
            raise _invalid_form(f"a part's headers are longer than {_MAX_HEADER_BYTES} bytes")
        name, is_file = _read_headers(bytes(body[place + 2 : end]))
        stop = _find(body, b"\r\n" + mark, end + 4)
        if stop < 0:
            raise _invalid_form("its last boundary is missing")
        parts.append(Part(name, is_file, view[end + 4 : stop]))
        place = stop + 2 + len(mark)
    if bytes(view[place + 2 : place + 6]).strip() or len(body) > place + 4:
        raise _invalid_form("it goes on after its last boundary")
    return parts


def _find(body: bytes | bytearray, mark: bytes, start: int) -> int:
    """Find in steps, since each holds the interpreter."""
    while start < len(body):
        found = body.find(mark, start, start + _WINDOW + len(mark))
        if found >= 0:
            return found
        start += _WINDOW
    return -1


def _read_headers(text: bytes) -> tuple[str, bool]:
    """Return a part's name, and whether it is a file."""
    for line in text.split(b"\r\n"):
        kind, _, value = line.partition(b":")
        if kind.strip().lower() != b"content-disposition":
            continue
        try:
            options = {
                found[1].lower(): found[2] if found[2] is not None else found[3]
                for found in _OPTION.finditer(value.decode())
            }
        except UnicodeDecodeError as error:
            raise _invalid_form("a part's name is not UTF-8") from error
        if "name" in options and value.strip().lower().startswith(b"form-data"):
            return options["name"], "filename" in options or "filename*" in options
    raise _invalid_form("a part has no Content-Disposition: form-data with a name")


def _invalid_form(seen: str) -> RequestError:
    return RequestError("the body is not a valid multipart form", seen=seen)


def read_form(
    body: bytes | bytearray, content_type: str, kind: type[Body]
) -> tuple[dict[str, str], list[memoryview]]:
    """Return the text fields of a form, and the files of its images.

    Raises:
        RequestError: it is not such a form, or has a part that the request cannot have.
    """
    fields: dict[str, str] = {}
    files: list[memoryview] = []
    for part in split_form(body, content_type):
        if part.name == "mask":
            raise NoEffectError(
                "mask has no effect: the models here edit by words alone", setting="mask"
            )
        if part.name in ("image", "image[]"):
            if not part.is_file:
                seen = bytes(part.data[:MAX_NAME]).decode(errors="replace")
                raise RequestError("image must be a file", seen=seen, setting="image")
            files.append(part.data)
        elif part.name not in kind.model_fields:
            raise unknown_parameter(part.name, kind)
        elif part.is_file:
            _refuse_file(part.name)
        elif part.name in fields:
            raise RequestError(f"duplicate {part.name}", setting=part.name)
        else:
            fields[part.name] = _read_text(part)
    if not 1 <= len(files) <= MAX_IMAGES:
        raise RequestError(
            "image is missing" if not files else "too many images",
            seen=len(files),
            allowed=f"1 to {MAX_IMAGES}",
            setting="image",
        )
    return fields, files


def _refuse_file(name: str) -> NoReturn:
    raise RequestError(f"{name} must not be a file", allowed="image", setting=name)


def _read_text(part: Part) -> str:
    if len(part.data) > _MAX_FIELD_BYTES:
        raise RequestError(
            f"{part.name} is too long",
            seen=f"{len(part.data)} bytes",
            allowed=f"{_MAX_FIELD_BYTES} bytes",
            setting=part.name,
        )
    try:
        return bytes(part.data).decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{part.name} is not UTF-8", seen=str(error)[:80], setting=part.name
        ) from error
