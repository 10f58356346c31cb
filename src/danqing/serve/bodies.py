"""The fields of a request body: those of the images API, and the settings of `Request`.

A field that is unknown, or that would change nothing, is refused by its name. The settings come
from `Request.model_fields`: one that is added there is a field of the bodies, of the form of an
edit and of the OpenAPI document, unless `EXCLUDED` names it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from danqing.errors import RequestError, UnknownSettingError
from danqing.escaping import escape
from danqing.request import MAX_PROMPT_CHARACTERS, MAX_SEED, Request
from danqing.serve.jobs import Order
from danqing.validation import explain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from danqing.references import Reference

Scalar: TypeAlias = "str | int | float | bool | None"
MAX_PICTURES = 10
MAX_PREVIEWS = 3
MIN_SIDE = 8
MAX_FIELDS = 64
"""Of a body, JSON or form; the API has fewer."""
MAX_NAME = 80
"""Characters of an unknown name that an error repeats."""
PLAIN_TEXT = r"^[^\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x9F]*$"
"""No control characters but tabs and line breaks."""
EXCLUDED = {
    "prompt": "every body has it",
    "num_images_per_prompt": "`n` in the images API",
    "height": "a part of `size`",
    "width": "a part of `size`",
    "image": "the files of a form",
}
"""Fields of `Request` that a body does not take by this name, each with the reason."""
SETTINGS = {*Request.model_fields} - EXCLUDED.keys()
"""Fields of `Request` that are fields of a body."""
_NARROWED = {"seed": (Field(le=MAX_SEED - MAX_PICTURES + 1),)}
"""Bounds beyond those of `Request`: the last image's seed is seed + n - 1."""
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


class Body(BaseModel):
    """The fields of the images API, and two of danqing's own beside them."""

    model_config = ConfigDict(extra="forbid")

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
    n: Annotated[int | None, Field(ge=1, le=MAX_PICTURES, description="Number of images.")] = None
    size: Annotated[
        str | None,
        Field(
            description="WIDTHxHEIGHT in pixels, or auto for the model's own.",
        ),
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None,
        Field(description="The image itself (the default), or its address."),
    ] = None
    output_format: Annotated[
        Literal["png", "jpeg", "webp"] | None, Field(description="File format; png by default.")
    ] = None
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="Quality of jpeg and webp; 100 is the best.")
    ] = None
    quality: Annotated[
        Literal["auto", "standard"] | None,
        Field(description="For compatibility only; num_inference_steps sets the quality."),
    ] = None
    background: Annotated[
        Literal["auto", "opaque"] | None,
        Field(description="Images are opaque."),
    ] = None
    moderation: Annotated[
        Literal["auto"] | None,
        Field(description="See safety_checker of /v1/models."),
    ] = None
    user: Annotated[
        str | None,
        Field(max_length=256, pattern=PLAIN_TEXT, description="Name of your user, for the log."),
    ] = None
    stream: Annotated[bool | None, Field(description="Stream server-sent events.")] = None
    partial_images: Annotated[
        int | None,
        Field(ge=0, le=MAX_PREVIEWS, description="Previews of each image; requires stream."),
    ] = None
    progress: Annotated[
        bool | None, Field(description="Send an event for each step; requires stream.")
    ] = None


def setting_fields(request: type[Request] = Request, *, edits: bool) -> dict[str, Any]:
    """Return the settings of a request as optional fields of a body.

    Args:
        request: with the fields, their bounds and descriptions.
        edits: those that need an image to edit, or those that do not.
    """
    found: dict[str, Any] = {}
    for name, field in request.model_fields.items():
        extra = field.json_schema_extra
        needs_image = isinstance(extra, dict) and extra.get("needs") == "image"
        if name in EXCLUDED or needs_image != edits:
            continue
        kind: Any = field.annotation
        for bound in (*field.metadata, *_NARROWED.get(name, ())):
            kind = Annotated[kind, bound]
        found[name] = (kind | None, Field(default=None, description=field.description))
    return found


GenerationBody: type[Body] = create_model(
    "GenerationRequest",
    __base__=Body,
    __doc__="An image made from a prompt.",
    **setting_fields(edits=False),
)
EditBody: type[Body] = create_model(
    "EditRequest",
    __base__=GenerationBody,
    __doc__="An image made from a prompt and from other images, which come as files.",
    **setting_fields(edits=True),
)


def unknown_parameter(name: str, kind: type[Body]) -> UnknownSettingError:
    """Return the error of a field that a body does not have."""
    short = escape(name[:MAX_NAME], one_line=True)
    return UnknownSettingError(
        f"unknown parameter {short!r}", allowed=", ".join(kind.model_fields), setting=short
    )


def read_body(kind: type[Body], fields: Mapping[str, Scalar], *, from_json: bool) -> Body:
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
            raise unknown_parameter(name, kind)
    try:
        return kind.model_validate(fields, strict=from_json)
    except ValidationError as error:
        raise explain(error, kind, noun="parameter") from error


def read_order(
    body: Body,
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
    settings = body.model_dump(include=SETTINGS, exclude_none=True)
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
        RequestError: invalid size.
    """
    if text in (None, "auto"):
        return {}
    match = _SIZE.fullmatch(text or "")
    sides = [int(one) for one in match.groups()] if match else [0]
    if not all(MIN_SIDE <= side <= most for side in sides):
        raise RequestError(
            "invalid size",
            seen=text,
            allowed=f"auto, or WIDTHxHEIGHT, each side of {MIN_SIDE} to {most} pixels",
            setting="size",
        )
    return {"width": sides[0], "height": sides[1]}
