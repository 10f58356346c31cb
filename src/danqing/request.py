"""What is asked (`Request`) and what comes out (`Generation`); no torch here.

`Request` is the one definition of a picture's settings: the command line's flags, the JSON lines
of a prompts file and the reference in the docs are made from its fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

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

from danqing.errors import RequestError, UnknownSettingError
from danqing.references import Reference, read_references
from danqing.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image
    from pydantic_core import ErrorDetails
    from typing_extensions import Self

    from danqing.arrays import Array

MAX_PROMPT_CHARACTERS = 8000
"""Sixteen times what the longest text encoder reads (512 tokens); more is a mistaken file."""
MAX_SEED = 2**64 - 1
"""The largest seed a PyTorch CPU generator takes."""
MAX_SIDE = 16384
"""Pixels; beyond it the noise alone is larger than a GiB."""
RECORD_SCHEMA = 1

MAX_IMAGES = 8
MAX_BATCH = 64

StageName = Literal["load", "encode", "denoise", "decode"]
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
        json_schema_extra={"flags": ["--input-image"]},
    )
    resize: Resize | None = Field(
        default=None,
        description="How a picture to edit is fitted: `keep` its aspect ratio, or `stretch` it to "
        "the width and height asked for, as benchmarks do.",
    )
    reference_latent: ReferenceLatent | None = Field(
        default=None,
        description="What is taken of a picture's encoding: a `sample`, drawn from the seed, or "
        "the `mode`.",
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
            raise _explain(error.errors(include_url=False)) from error

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

    def single(self, index: int) -> Self:
        """Return the request for picture `index` alone; its seed must be known."""
        if self.seed is None:
            raise RequestError("the request has no seed yet", hint="resolve it first")
        return self.replace(seed=self.seed + index, num_images_per_prompt=1)


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


_OUT_OF_RANGE = ("greater_than_equal", "less_than_equal", "literal_error")


def _explain(faults: Sequence[ErrorDetails]) -> RequestError:
    """Turn pydantic's list of faults into one error, in the user's words."""
    fault = faults[0]
    name = ".".join(map(str, fault["loc"]))
    seen = repr(fault.get("input"))[:80]
    kind = fault["type"]
    if kind == "extra_forbidden":
        return UnknownSettingError(
            f"unknown setting {name!r}",
            seen=name,
            allowed=", ".join(Request.model_fields),
            setting=name,
        )
    if kind == "missing":
        return RequestError(
            f"{name} is missing", allowed="every request has a prompt", setting=name
        )
    if kind in _OUT_OF_RANGE:
        what = "is none of the words" if kind == "literal_error" else "is out of range"
        return RequestError(
            f"{name} {what}",
            seen=seen,
            allowed=allowed_range(name) or fault["msg"],
            setting=name,
        )
    return RequestError(f"{name} cannot be used", seen=seen, allowed=fault["msg"], setting=name)


def check_batch(batch: int) -> None:
    """See that so many pictures can be computed together.

    Raises:
        RequestError: they cannot.
    """
    if not 1 <= batch <= MAX_BATCH:
        raise RequestError("batch is out of range", seen=batch, allowed=f"1 to {MAX_BATCH}")


def allowed_range(name: str) -> str | None:
    """Return what a setting's value may be, in words; None where anything may."""
    schema = Request.model_json_schema()["properties"].get(name, {})
    for option in [schema, *schema.get("anyOf", [])]:
        if "enum" in option:
            return ", ".join(option["enum"])
        if "minimum" in option and "maximum" in option:
            kind = "whole numbers from " if option["type"] == "integer" else ""
            return f"{kind}{option['minimum']} to {option['maximum']}"
    return None


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage took.

    Attributes:
        name: `load`, `encode`, `denoise` or `decode`.
        seconds: wall time, the device synchronised before and after.
        peak_bytes: the most memory in use during the stage: the device allocator's peak, on a CPU
            the process's peak resident set; None where it cannot be known.
        pictures: how many pictures share this cost.
        steps: denoising steps inside, 0 in the other stages.
        component: which was read, in the stage `load`.
        reused: the stage was not run: its result for the same prompt was still there.
        compile_seconds: of its seconds, what torch.compile took.
    """

    name: StageName
    seconds: float
    peak_bytes: int | None
    pictures: int = 1
    steps: int = 0
    component: str = ""
    reused: bool = False
    compile_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made a picture, so that it can be made again.

    Attributes:
        model: family, kind, layout, path, weights fingerprint, and the SHA-256 of files that were
            computed before (`danqing check --digest`).
        device: name, chip, driver, threads, and why this device.
        dtype: what the model computes in.
        dtypes: dtype of each component.
        dtype_reason: why.
        attention: the attention kernel's name, `auto` for torch's own choice.
        placement: where the components are while they are not needed.
        versions: of danqing, Python, and the libraries that computed.
        noise_sha256: digest of this picture's starting noise (float32, little endian).
        batch: pictures computed together and, for more than one, what that did to the bits.
    """

    model: Mapping[str, Any]
    device: Mapping[str, Any]
    dtype: str
    dtypes: Mapping[str, str]
    dtype_reason: str
    attention: str
    placement: str
    versions: Mapping[str, str]
    noise_sha256: str
    batch: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One finished picture with everything known about it.

    Attributes:
        image: RGB, 8 bits.
        request: the resolved request that makes just this picture.
        index: its number among the pictures of the request it came from.
        stages: cost of each stage, in order.
        provenance: what made it.
        notes: what the user should know (a rounded size, a truncated prompt).
    """

    image: Image
    request: Request
    index: int
    stages: tuple[StageCost, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    @property
    def pixels_sha256(self) -> str:
        """Digest of the raw RGB bytes, row by row."""
        return hashlib.sha256(self.image.tobytes()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Return everything but the pixels, as it is written into the file; JSON types only."""
        return {
            "danqing": __version__,
            "schema": RECORD_SCHEMA,
            "ai_generated": True,
            "request": self.request.model_dump(),
            "picture": {
                "width": self.image.width,
                "height": self.image.height,
                "index": self.index,
                "pixels_sha256": self.pixels_sha256,
            },
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "provenance": dataclasses.asdict(self.provenance),
            "notes": list(self.notes),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the picture with its record; see `danqing.pictures.save`."""
        from danqing.pictures import save

        return save(self.image, self.record(), path, overwrite=overwrite)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The answer to one request.

    Attributes:
        pictures: as many as `request.num_images_per_prompt`, in the order of their seeds.
        request: the resolved request: what was asked, with every default filled in.
    """

    pictures: tuple[Picture, ...]
    request: Request

    @property
    def image(self) -> Image:
        """The first picture's pixels."""
        return self.pictures[0].image

    @property
    def images(self) -> tuple[Image, ...]:
        """All pictures' pixels."""
        return tuple(picture.image for picture in self.pictures)

    @property
    def stages(self) -> tuple[StageCost, ...]:
        """Cost of each stage of the first picture."""
        return self.pictures[0].stages

    @property
    def provenance(self) -> Provenance:
        """What made the first picture."""
        return self.pictures[0].provenance

    def save(self, path: str | Path, *, overwrite: bool = False) -> tuple[Path, ...]:
        """Write all pictures.

        Args:
            path: a file name; `{seed}`, `{index}` and `{model}` are filled in. The suffix chooses
                PNG, JPEG or WebP.
            overwrite: replace a file that is there; otherwise the next free name is taken.

        Returns:
            The names really used.
        """
        from danqing.pictures import fill_template

        return tuple(
            picture.save(
                fill_template(
                    str(path),
                    seed=picture.request.seed,
                    index=picture.index,
                    model=picture.provenance.model["name"],
                ),
                overwrite=overwrite,
            )
            for picture in self.pictures
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report from a long piece of work.

    Attributes:
        stage: which stage reports; `wait` while requests of other threads have the device.
        item: the component being loaded, the image being made, or the device waited for.
        done: bytes, steps or requests finished.
        total: bytes, steps or requests in all.
        unit: what is counted.
        seconds: since the item began.
        preview: what the picture will look like, as far as it can be told; of some steps only.
    """

    stage: StageName | Literal["wait"]
    item: str
    done: int
    total: int
    unit: Literal["bytes", "steps", "requests"]
    seconds: float = field(default=0.0, compare=False)
    preview: Image | None = field(default=None, compare=False)


Listener: TypeAlias = "Callable[[Progress], None]"
"""Is told of progress; an exception it raises ends the work."""


Probe: TypeAlias = "Callable[[str, Array], Array | None]"
"""Is shown each tensor at the joints of a run; what it returns is taken in its place.

The joints, in order: `encode/NAME`, `draw/NUMBER` (0 is the noise), for each step
`denoise/STEP/velocity` and `denoise/STEP/latents`, and `decode/pixels`."""


Inside: TypeAlias = "Callable[[str, str, int], bool]"
"""Says which layers' outputs a probe is shown too: of a component, by path, and how many times the
layer was called in this run (from 1). Their names are `inside/COMPONENT/PATH/CALL/NUMBER`."""


class Runner(Protocol):
    """Anything that answers a request: the engine, a pool of machines, a fake in a test."""

    def generate(self, prompt: str | Request, /, **settings: Any) -> Generation:
        """Answer one request."""
        ...


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
