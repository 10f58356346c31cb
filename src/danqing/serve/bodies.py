"""What clients send: the fields of the images API, and danqing's own beside them.

A field that is unknown, or that would change nothing, is refused by its name.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from danqing.errors import NoEffectError, RequestError, UnknownSettingError
from danqing.escaping import escape
from danqing.references import Reference, read_references
from danqing.request import MAX_IMAGES, MAX_PROMPT_CHARACTERS, MAX_SEED, Request
from danqing.serve.jobs import Order
from danqing.validation import explain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

    from danqing.serve.service import Limits, Takes

MAX_PICTURES = 10
MAX_PREVIEWS = 3
LAST_SEED = MAX_SEED - MAX_PICTURES + 1
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_EDIT_PIXELS = 32_000_000
"""Of a picture to edit: what a good camera makes; 96 MB when it is decoded."""
MAX_EDIT_PIXELS_IN_ALL = 2 * MAX_EDIT_PIXELS
"""Of all images of one request."""
MIN_SIDE = 8
MAX_FIELDS = 64
"""Of a body, JSON or form; the API has fewer."""
_MAX_NAME = 80
_MAX_DIGITS = 400
_MAX_FIELD_BYTES = 64 << 10
"""Of a form's text field: the longest prompt, four bytes a character, and some to spare."""
_MAX_HEADER_BYTES = 4 << 10
_WINDOW = 1 << 20
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_NOT_BLANK = r"\S"
_PLAIN = r"^[^\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x9F]*$"
"""No control characters but tabs and line breaks."""
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]


class GenerationBody(BaseModel):
    """A picture that is asked for by words."""

    model_config = ConfigDict(extra="forbid", title="GenerationRequest")

    prompt: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_PROMPT_CHARACTERS,
            description="What the picture shows.",
            examples=["three blue mountains under a red sun, a boat on the water"],
        ),
    ]
    model: Annotated[str | None, Field(description="One of /v1/models; the first if left out.")] = (
        None
    )
    n: Annotated[int | None, Field(ge=1, le=MAX_PICTURES, description="How many pictures.")] = None
    size: Annotated[
        str | None,
        Field(
            description="WIDTHxHEIGHT in pixels, or auto: the model's own.",
        ),
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None,
        Field(description="The picture itself (the default), or where it can be fetched."),
    ] = None
    output_format: Annotated[
        Literal["png", "jpeg", "webp"] | None, Field(description="Of the file; png if left out.")
    ] = None
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="Quality of jpeg and webp, 100 the best.")
    ] = None
    quality: Annotated[
        Literal["auto", "standard"] | None,
        Field(description="The model's own; num_inference_steps changes it."),
    ] = None
    background: Annotated[
        Literal["auto", "opaque"] | None, Field(description="Pictures are opaque.")
    ] = None
    moderation: Annotated[
        Literal["auto"] | None, Field(description="As /v1/models says of the safety checker.")
    ] = None
    user: Annotated[
        str | None,
        Field(max_length=256, pattern=_PLAIN, description="Your user's name; it is logged."),
    ] = None
    stream: Annotated[
        bool | None, Field(description="Answer with server-sent events as it goes on.")
    ] = None
    partial_images: Annotated[
        int | None,
        Field(ge=0, le=MAX_PREVIEWS, description="Previews of each picture; with stream."),
    ] = None
    progress: Annotated[
        bool | None, Field(description="An event for each step as well; with stream.")
    ] = None
    seed: Annotated[
        int | None,
        Field(ge=0, le=LAST_SEED, description="Of the first picture; picture k has seed + k."),
    ] = None
    negative_prompt: Annotated[
        Text | None, Field(description="What to keep out, in models that can.")
    ] = None
    num_inference_steps: Annotated[
        int | None, Field(ge=1, le=1000, description="Denoising steps.")
    ] = None
    guidance_scale: Annotated[
        float | None,
        Field(ge=0, le=100, allow_inf_nan=False, description="In models that are guided."),
    ] = None
    max_sequence_length: Annotated[
        int | None, Field(ge=1, le=4096, description="Tokens of the prompt that are read.")
    ] = None


class EditBody(GenerationBody):
    """A picture that is made from others and words; the pictures come as files."""

    model_config = ConfigDict(extra="forbid", title="EditRequest")

    resize: Annotated[
        Literal["keep", "stretch"] | None, Field(description="How a picture is fitted.")
    ] = None
    reference_latent: Annotated[
        Literal["sample", "mode"] | None, Field(description="What is taken of its encoding.")
    ] = None


_Body = TypeVar("_Body", bound=GenerationBody)
_SETTINGS = (
    "seed", "negative_prompt", "num_inference_steps", "guidance_scale", "max_sequence_length",
    "resize", "reference_latent",
)  # fmt: skip


def _unknown(name: str, kind: type[GenerationBody]) -> UnknownSettingError:
    short = escape(name[:_MAX_NAME], one_line=True)
    return UnknownSettingError(
        f"unknown parameter {short!r}", allowed=", ".join(kind.model_fields), setting=short
    )


# --- JSON --------------------------------------------------------------------------------------

Scalar: TypeAlias = "str | int | float | bool | None"
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_CONSTANTS = {"true": True, "false": False, "null": None}
_STRINGS = json.JSONDecoder()


def read_object(data: bytes, kind: type[GenerationBody]) -> dict[str, Scalar]:
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


def _read_fields(
    text: str, place: int, kind: type[GenerationBody]
) -> tuple[dict[str, Scalar], int]:
    """Return the fields, and where the object ends."""
    fields: dict[str, Scalar] = {}
    if text.startswith("}", place):
        return fields, place + 1
    while True:
        name, place = _read_string(text, place, "a field's name")
        if name not in kind.model_fields:
            raise _unknown(name, kind)
        if name in fields:
            raise RequestError(f"{name} is given twice", setting=name)
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
            f"{name} cannot be used",
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
            f"{name} cannot be used",
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


# --- forms -------------------------------------------------------------------------------------

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
    body: bytes | bytearray, content_type: str, kind: type[GenerationBody]
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
                seen = bytes(part.data[:_MAX_NAME]).decode(errors="replace")
                raise RequestError("image must be a file", seen=seen, setting="image")
            files.append(part.data)
        elif part.name not in kind.model_fields:
            raise _unknown(part.name, kind)
        elif part.is_file:
            _refuse_file(part.name)
        elif part.name in fields:
            raise RequestError(f"{part.name} is given twice", setting=part.name)
        else:
            fields[part.name] = _read_text(part)
    if not 1 <= len(files) <= MAX_IMAGES:
        raise RequestError(
            "image is missing" if not files else "there are too many images",
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


# --- fields ------------------------------------------------------------------------------------


def read_body(kind: type[_Body], fields: Mapping[str, Scalar], *, from_json: bool) -> _Body:
    """Return a body.

    Args:
        kind: of which request.
        fields: as they came.
        from_json: numbers are numbers there; in a form all are texts.

    Raises:
        RequestError: naming the first field that is wrong.
    """
    for name in fields:
        if name not in kind.model_fields:
            raise _unknown(name, kind)
    try:
        return kind.model_validate(fields, strict=from_json)
    except ValidationError as error:
        raise explain(error, kind, noun="parameter") from error


def read_order(
    body: GenerationBody,
    model: str,
    images: Sequence[Reference] = (),
    *,
    most: int,
    edits: bool = False,
) -> Order:
    """Return what a body asks for.

    Args:
        body: as it came.
        model: the model's name.
        images: to be edited.
        most: pixels of a side.
        edits: it is to be an edit.

    Raises:
        RequestError: two of its fields contradict each other, or one has no effect.
    """
    if not body.stream:
        for name in ("partial_images", "progress"):
            if getattr(body, name):
                raise RequestError(
                    f"{name} has no effect without stream", seen=getattr(body, name), setting=name
                )
    output_format = body.output_format or "png"
    if output_format == "png" and body.output_compression not in (None, 100):
        raise RequestError(
            "output_compression has no effect on png",
            seen=body.output_compression,
            allowed="output_format jpeg or webp",
            setting="output_compression",
        )
    settings = {
        name: value for name in _SETTINGS if (value := getattr(body, name, None)) is not None
    }
    request = Request(
        prompt=body.prompt,
        num_images_per_prompt=body.n or 1,
        image=list(images) or None,
        **settings,
        **read_size(body.size, most),
    )
    return Order(
        model=model,
        request=request,
        output_format=output_format,
        quality=None if output_format == "png" else body.output_compression,
        previews=(body.partial_images or 0) if body.stream else 0,
        edits=edits,
        user=body.user,
    )


def read_size(text: str | None, most: int) -> dict[str, int]:
    """Return height and width that a size names; nothing if it leaves them to the model.

    Args:
        text: WIDTHxHEIGHT, or auto.
        most: pixels of a side.

    Raises:
        RequestError: it is none.
    """
    if text in (None, "auto"):
        return {}
    match = _SIZE.fullmatch(text or "")
    sides = [int(one) for one in match.groups()] if match else [0]
    if not all(MIN_SIDE <= side <= most for side in sides):
        raise RequestError(
            "the size cannot be used",
            seen=text,
            allowed=f"auto, or WIDTHxHEIGHT, each side of {MIN_SIDE} to {most} pixels",
            setting="size",
        )
    return {"width": sides[0], "height": sides[1]}


def read_pictures(files: Sequence[bytes | memoryview]) -> list[Reference]:
    """Return the images to edit of one request.

    Raises:
        RequestError: naming the first that cannot be used.
    """
    found, pixels = [], 0
    for number, data in enumerate(files, start=1):
        name = f"image {number}"
        found.append(read_picture(data, name, MAX_EDIT_PIXELS_IN_ALL - pixels))
        pixels += found[-1].width * found[-1].height
    return found


def read_picture(
    data: bytes | memoryview, name: str, most: int = MAX_EDIT_PIXELS_IN_ALL
) -> Reference:
    """Return an image that came in a request as upright RGB; it is judged before it is decoded.

    Args:
        data: of the file.
        name: for errors.
        most: pixels that other images of the request leave for it.

    Raises:
        RequestError: it is not a PNG, JPEG or WebP, too large, or broken.
    """
    from PIL import Image as Images
    from PIL import UnidentifiedImageError

    data = bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its metadata; its size is judged below
            image = Images.open(io.BytesIO(data), formats=PICTURE_FORMATS)
            _judge(image, name, most)
            image.load()
            _check_end(image.format, data, name)
            return read_references(image)[0]
    except Images.DecompressionBombError as error:
        raise _bad(name, escape(str(error)[:200]), f"{MAX_EDIT_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise _bad(name, f"{len(data)} bytes of no such format", "PNG, JPEG, WebP") from error
    except RequestError as error:
        if error.setting:
            raise
        raise _bad(name, str(error), "PNG, JPEG, WebP") from error
    except Exception as error:  # Pillow raises many kinds for broken files
        seen = f"it is broken: {escape(str(error)[:200], one_line=True)}"
        raise _bad(name, seen, "PNG, JPEG, WebP") from error


def _judge(image: Image, name: str, most: int) -> None:
    """Refuse a picture by what its header says."""
    pixels = image.width * image.height
    if pixels > MAX_EDIT_PIXELS:
        raise _bad(name, f"{image.width}x{image.height}", f"{MAX_EDIT_PIXELS} pixels in all")
    if pixels > most:
        raise _bad(
            name, f"{image.width}x{image.height}, beside the others",
            f"{MAX_EDIT_PIXELS_IN_ALL} pixels in all images of a request",
        )  # fmt: skip
    if getattr(image, "n_frames", 1) > 1:
        raise _bad(name, "several frames", "one picture")


def _check_end(kind: str | None, data: bytes, name: str) -> None:
    """Refuse a file that is cut off, or that goes on as another after the picture.

    Pillow reads what is there; a JPEG may be followed by what phones put there.
    """
    whole = {
        "PNG": data.endswith(_PNG_END),
        "WEBP": len(data) - 8 in (int.from_bytes(data[4:8], "little") + odd for odd in (0, 1)),
        "JPEG": _JPEG_END in data,
    }
    if not whole.get(kind or "", False):
        raise _bad(name, f"{kind} that does not end where it says", "a whole file")


def _bad(name: str, seen: str, allowed: str) -> RequestError:
    return RequestError("an image cannot be used", seen=seen, allowed=allowed, setting=name)


def describe(
    kind: type[GenerationBody], specs: Mapping[str, Takes], limits: Limits
) -> dict[str, Any]:
    """Return the JSON schema of a body exactly as this server takes it.

    Fields that have an effect only beside another make variants: with `stream`, and by
    `output_format`.

    Args:
        kind: of which request.
        specs: of the models by name.
        limits: of the server.
    """
    schema = kind.model_json_schema()
    fields: dict[str, dict[str, Any]] = schema["properties"]
    fields["prompt"]["allOf"] = [{"pattern": pattern} for pattern in (_NOT_BLANK, _PLAIN)]
    fields["model"] |= {"enum": [*specs, None]}
    for name, most in (
        ("n", limits.pictures),
        ("num_inference_steps", limits.steps),
        (
            "max_sequence_length",
            max(s.limits.get("max_sequence_length", 4096) for s in specs.values()),
        ),
    ):
        _number(fields[name])["maximum"] = min(most, _number(fields[name])["maximum"])
    _number(fields["size"])["pattern"] = _size_pattern(limits.side)
    for name in ("negative_prompt", "user"):
        _number(fields[name])["pattern"] = _PLAIN
    for name in _SETTINGS:
        if name in fields and all(name in spec.no_effect for spec in specs.values()):
            fields[name] = {"type": "null", "description": "Has no effect in the models here."}
    still: dict[str, Any] = {"stream": {"enum": [False, None]}}
    still |= {"partial_images": {"enum": [0, None]}, "progress": {"enum": [False, None]}}
    png = {"output_format": {"enum": ["png", None]}, "output_compression": {"enum": [100, None]}}
    streams = {"stream": {"const": True}}
    lossy = {"output_format": {"enum": ["jpeg", "webp"]}}
    variants = [
        {**schema, "properties": {**fields, **by, **how}, "required": sorted({"prompt", *needs})}
        for by, how, needs in (
            (still, png, ()),
            (still, lossy, ("output_format",)),
            (streams, png, ("stream",)),
            (streams, lossy, ("output_format", "stream")),
        )
    ]
    return {"title": schema["title"], "anyOf": variants}


def _number(field: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an optional field's schema that says what it is when it is there."""
    found: dict[str, Any] = field["anyOf"][0]
    return found


def _size_pattern(most: int) -> str:
    side = _whole_numbers(most)
    return f"^(auto|({side})x({side}))$"


def _whole_numbers(most: int) -> str:
    """Return a pattern for 8 to `most`, without leading zeros."""
    text = str(most)
    parts = ["[89]"] + [f"[1-9][0-9]{{{digits}}}" for digits in range(1, len(text) - 1)]
    for place, digit in enumerate(text):
        low = 1 if place == 0 else 0
        if int(digit) > low:
            rest = len(text) - place - 1
            parts.append(
                f"{text[:place]}[{low}-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else "")
            )
    return "|".join([*parts, text])
