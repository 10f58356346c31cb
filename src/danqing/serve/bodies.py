"""What clients send: the fields of the images API, and danqing's own beside them.

A field that is unknown, or that would change nothing, is refused by its name.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from danqing.errors import RequestError, UnknownSettingError
from danqing.request import MAX_PROMPT_CHARACTERS, MAX_SEED, Request
from danqing.serve.jobs import Order

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
MIN_SIDE = 8
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


_SETTINGS = (
    "seed", "negative_prompt", "num_inference_steps", "guidance_scale", "max_sequence_length",
    "resize", "reference_latent",
)  # fmt: skip


def read_body(kind: type[GenerationBody], fields: Any, *, from_json: bool) -> GenerationBody:
    """Return a body.

    Args:
        kind: of which request.
        fields: as they came.
        from_json: numbers are numbers there; in a form all are texts.

    Raises:
        RequestError: naming the first field that is wrong.
    """
    if not isinstance(fields, dict):
        raise RequestError("the body is no JSON object", seen=repr(fields)[:80])
    try:
        return kind.model_validate(fields, strict=from_json)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in fault["loc"])
    seen = repr(fault.get("input"))[:80]
    if fault["type"] == "extra_forbidden":
        raise UnknownSettingError(
            f"unknown parameter {name!r}", allowed=", ".join(kind.model_fields), setting=name
        )
    if fault["type"] == "missing":
        raise RequestError(f"{name} is missing", setting=name)
    raise RequestError(f"{name} cannot be used", seen=seen, allowed=fault["msg"], setting=name)


def read_order(
    body: GenerationBody,
    model: str,
    images: Sequence[Image] = (),
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


def read_picture(data: bytes, name: str) -> Image:
    """Return a picture that came in a request; it is judged before it is decoded.

    Raises:
        RequestError: it is no PNG, JPEG or WebP, too large, or broken.
    """
    from PIL import Image as Images
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Images.DecompressionBombWarning)  # judged below
            image = Images.open(io.BytesIO(data), formats=PICTURE_FORMATS)
            _judge(image, name)
            image.load()
            _check_end(image.format, data, name)
    except Images.DecompressionBombError as error:
        raise _bad(name, str(error)[:200], f"{MAX_EDIT_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise _bad(name, f"{len(data)} bytes of no such format", "PNG, JPEG, WebP") from error
    except RequestError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        raise _bad(name, f"it is broken: {str(error)[:200]}", "PNG, JPEG, WebP") from error
    return image


def _judge(image: Image, name: str) -> None:
    """Refuse a picture by what its header says."""
    if image.width * image.height > MAX_EDIT_PIXELS:
        raise _bad(name, f"{image.width}x{image.height}", f"{MAX_EDIT_PIXELS} pixels in all")
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
    return RequestError("a picture cannot be used", seen=seen, allowed=allowed, setting=name)


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
