"""What is asked, `Request`, and what a model makes of it, `Resolved`; no torch here.

`Request` is the one definition of a picture's settings: the command line's flags, the JSON lines
of a prompts file and the reference in the docs are made from its fields.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from danqing.errors import RequestError
from danqing.references import Reference, read_references
from danqing.validation import explain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self


MAX_PROMPT_CHARACTERS = 8000
"""Sixteen times what the longest text encoder reads (512 tokens); more is a mistaken file."""
MAX_SEED = 2**64 - 1
"""The largest seed a PyTorch CPU generator takes."""
MAX_SIDE = 16384
"""Pixels; beyond it the noise alone is larger than a GiB."""
RECORD_SCHEMA = 1

MAX_IMAGES = 8
MAX_BATCH = 64

Resize = Literal["keep", "stretch"]
ReferenceLatent = Literal["sample", "mode"]


def _read_images(given: Any) -> tuple[Reference, ...] | None:
    return None if given is None or given in ((), []) else read_references(given)


References = Annotated[
    tuple[InstanceOf[Reference], ...] | None,
    BeforeValidator(_read_images),
    PlainSerializer(lambda found: found and [one.record() for one in found]),
    WithJsonSchema({"type": "array", "items": {"type": "string"}}),
]
"""Reference images: given as file names, PIL images or records, kept as `Reference`."""


class Request(BaseModel):
    """One prompt and its settings; what is left out (`None`) takes the model's own default.

    Frozen and validated once. Names are diffusers' names.

    Raises:
        danqing.errors.RequestError: on any value that no model could use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str = Field(description="What the picture shows.")
    negative_prompt: str | None = Field(
        default=None, description="What to keep out, in models with classifier-free guidance."
    )
    image: References = Field(
        default=None,
        description="Picture to edit, in models that edit; several are all shown to the model.",
        json_schema_extra={"flags": ["--input-image"], "metavar": "FILE"},
    )
    resize: Resize | None = Field(
        default=None,
        description="How a picture to edit is fitted: `keep` its aspect ratio, or `stretch` it to "
        "the width and height asked for, as benchmarks do.",
        json_schema_extra={"needs": "image"},
    )
    reference_latent: ReferenceLatent | None = Field(
        default=None,
        description="What is taken of a picture's encoding: a `sample`, drawn from the seed, or "
        "the `mode`.",
        json_schema_extra={"needs": "image"},
    )
    height: Annotated[int, Field(ge=8, le=MAX_SIDE)] | None = Field(
        default=None, description="Height in pixels."
    )
    width: Annotated[int, Field(ge=8, le=MAX_SIDE)] | None = Field(
        default=None, description="Width in pixels."
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        default=None,
        description="Denoising steps.",
        json_schema_extra={"flags": ["--steps"]},
    )
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        default=None,
        description="How strongly the prompt guides, where the model has guidance.",
        json_schema_extra={"flags": ["--guidance"]},
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None,
        description="Seed of the first picture's noise; picture k has seed + k. "
        "Left out: the model's own, or a random one, which is printed and recorded.",
    )
    num_images_per_prompt: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=1,
        description="Pictures of this prompt.",
        json_schema_extra={"flags": ["--num-images"]},
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Tokens of the prompt that the text encoder reads."
    )

    def __init__(self, /, **settings: Any) -> None:
        """Validate the settings; any fault is a `RequestError`."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise explain(error, Request) from error

    @model_validator(mode="after")
    def _check(self) -> Request:
        _check_text("prompt", self.prompt)
        if self.negative_prompt is not None:
            _check_text("negative_prompt", self.negative_prompt, empty_is_fine=True)
        if self.image is not None and len(self.image) > MAX_IMAGES:
            raise RequestError(
                "there are too many images",
                setting="image",
                seen=len(self.image),
                allowed=f"at most {MAX_IMAGES}",
            )
        if self.seed is not None and self.seed + self.num_images_per_prompt - 1 > MAX_SEED:
            raise RequestError(
                "the last picture's seed (seed + number of pictures - 1) is too large",
                setting="seed",
                seen=self.seed + self.num_images_per_prompt - 1,
                allowed=f"0 to {MAX_SEED}",
            )
        return self

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed, validated again."""
        kind = type(self)
        now = {name: getattr(self, name) for name in kind.model_fields}
        return kind(**{**now, **changes})

    def select(self, first: int, count: int = 1) -> Self:
        """Return the request for `count` of its images, from image `first` on.

        Raises:
            RequestError: it has no seed.
        """
        if self.seed is None:
            raise RequestError("the request has no seed yet", hint="resolve it first")
        return self.replace(seed=self.seed + first, num_images_per_prompt=count)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A request as one model runs it: every setting has a value.

    Only `danqing.models.base.ModelSpec.resolve` makes one. A setting that the model does not take
    has the default below.

    Attributes:
        request: the request with the model's defaults filled in, as the record keeps it.
        notes: what the user should know (a rounded size).
        seed_is_random: neither the request nor the model named a seed, so one was drawn.
    """

    request: Request
    notes: tuple[str, ...]
    seed_is_random: bool
    prompt: str
    height: int
    width: int
    seed: int
    num_images_per_prompt: int
    num_inference_steps: int = 1
    negative_prompt: str = ""
    image: tuple[Reference, ...] = ()
    resize: Resize = "keep"
    reference_latent: ReferenceLatent = "sample"
    guidance_scale: float = 0.0
    max_sequence_length: int = 0

    @property
    def forecast(self) -> Request:
        """The request as a dry run shows it: the next run would draw another random seed."""
        return self.request.replace(seed=None) if self.seed_is_random else self.request

    def single(self, index: int) -> Resolved:
        """Return the request for image `index` alone."""
        request = self.request.select(index)
        return replace(self, request=request, seed=self.seed + index, num_images_per_prompt=1)


def _check_text(name: str, text: str, *, empty_is_fine: bool = False) -> None:
    if not text.strip() and not empty_is_fine:
        raise RequestError(
            f"{name} is empty",
            setting=name,
            seen=repr(text),
            allowed=f"1 to {MAX_PROMPT_CHARACTERS} characters that are not all blank",
        )
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise RequestError(
            f"{name} is too long",
            setting=name,
            seen=f"{len(text)} characters, {len(text.split())} words",
            allowed=f"at most {MAX_PROMPT_CHARACTERS} characters",
            hint="text encoders read a few hundred words at most; for one prompt per line of a "
            "file use --prompts-file",
        )
    for place, letter in enumerate(text):
        if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\r\t":
            raise RequestError(
                f"{name} has a character that is no text",
                setting=name,
                seen=f"U+{ord(letter):04X} at position {place}",
                allowed="any printable text, emoji included, with tabs and line breaks",
            )


def check_batch(batch: int) -> None:
    """See that so many pictures can be computed together.

    Raises:
        RequestError: they cannot.
    """
    if not 1 <= batch <= MAX_BATCH:
        raise RequestError("batch is out of range", seen=batch, allowed=f"1 to {MAX_BATCH}")


def request_from_record(record: Mapping[str, Any], changes: Mapping[str, Any] = {}) -> Request:
    """Return the resolved request kept in a picture's record, with some settings changed.

    Raises:
        RequestError: the record is of another schema, or is not a record.
    """
    if record.get("schema") != RECORD_SCHEMA or not isinstance(record.get("request"), dict):
        raise RequestError(
            "the picture's record cannot be read",
            seen=json.dumps(record.get("schema"))[:80],
            allowed=f"schema {RECORD_SCHEMA}",
            hint="it was written by another version of danqing",
        )
    return Request(**{**record["request"], **changes})
