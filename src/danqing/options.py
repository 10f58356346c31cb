"""How a model runs: `Options`; no torch here.

`Options` is the one definition: `danqing.open` takes its fields, the flags of every command that
opens a model are made from them, and the record in an image keeps them. `Plan` resolves them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
)

from danqing.errors import RequestError
from danqing.files import expand
from danqing.validation import explain

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

OLD_NAMES = {"quantise": "quantize", "compile_with": "compile"}
"""Names that older programs use."""
LOCAL = frozenset({"components", "allow_pt", "prompt_cache"})
"""Options about files of this machine: a record does not keep them, nor decide them."""
_SIZE = re.compile(r"\s*\d{1,30}(\.\d{1,30})?\s*[a-zA-Z]*\s*")


def _read_size(value: Any, read: Callable[[Any], ByteSize | None]) -> ByteSize | None:
    """Read a byte size; stricter than `ByteSize`, which reads `1,5GiB` as one byte."""
    try:
        return read("" if isinstance(value, str) and not _SIZE.fullmatch(value) else value)
    except ValueError:
        raise ValueError("8GiB, 12000MB, ...") from None


def _read_tile(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _read_paths(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: str(path) if isinstance(path, Path) else path for name, path in value.items()}


def _read_folder(value: Any) -> Any:
    return expand(value) if isinstance(value, str | Path) else value


class Options(BaseModel):
    """How a model runs on a device; the plan resolves each choice that is `auto`.

    Frozen and validated once; `None` stands for the default. An option marked as a switch must not
    change the image: `danqing verify invariance` judges its choices.

    Raises:
        danqing.errors.UnknownSettingError: unknown option.
        danqing.errors.RequestError: invalid value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    device: str = Field(
        default="auto",
        description="Device: auto, cpu, cuda[:i], npu[:i], xpu[:i] or mps.",
    )
    dtype: str = Field(default="auto", description="Precision: auto, bfloat16, float16 or float32.")
    placement: Literal["auto", "resident", "staged", "streamed"] = Field(
        default="auto",
        description="Weights in memory: auto, resident (all), staged (those of one stage) or "
        "streamed (block by block).",
        json_schema_extra={"switch": True},
    )
    memory: Annotated[Annotated[ByteSize, Field(gt=0)] | None, WrapValidator(_read_size)] = Field(
        default=None,
        description="Memory limit of the device, or of the process on a CPU: 8GiB, 12000MB.  "
        "[default: 90% of the free memory]",
        json_schema_extra={"metavar": "SIZE"},
    )
    tile: Annotated[str, BeforeValidator(_read_tile)] = Field(
        default="auto",
        description="Tiled decoding: auto (if the whole image does not fit), off, or the side of "
        "a tile in pixels.",
        json_schema_extra={"metavar": "N"},
    )
    quantize: Literal["off", "int8"] = Field(
        default="off",
        description="off, or int8: compute the denoiser's linear layers in 8 bits. Faster, half "
        "the memory, not bit-exact.",
    )
    attention: str = Field(
        default="auto",
        description="Attention kernel: auto, torch, native, math, flash, efficient, cudnn; on an "
        "NPU npu or mindie.",
        json_schema_extra={"switch": True},
    )
    deterministic: bool = Field(
        default=False,
        description="Use only kernels that reproduce the same bits.",
        json_schema_extra={"switch": True},
    )
    compile: str = Field(
        default="off",
        description="Compile the denoiser's blocks: off, inductor; on an NPU npugraph or torchair.",
        json_schema_extra={"switch": True},
    )
    fused: str = Field(
        default="auto",
        description="Fused kernels: auto, off, all, or names with commas, such as rms_norm,rope.",
        json_schema_extra={"metavar": "NAMES", "switch": True},
    )
    place: Annotated[dict[str, str], BeforeValidator(_read_paths)] = Field(
        default={},
        description="Device of one component, such as vlm=npu:1.",
        json_schema_extra={"metavar": "NAME=DEVICE"},
    )
    components: Annotated[dict[str, str], BeforeValidator(_read_paths)] = Field(
        default={},
        description="Path of one component (t5, clip, vlm, vae, transformer, ...).",
        json_schema_extra={"flag": "--component", "metavar": "NAME=PATH"},
    )
    allow_pt: bool = Field(
        default=False,
        description="Allow DeepGen's original .pt, opened by torch.load with weights_only.",
    )
    prompt_cache: Annotated[Path, BeforeValidator(_read_folder)] | None = Field(
        default=None,
        description="Folder that caches prompt embeddings, so a repeated prompt skips the text "
        "encoders.",
        json_schema_extra={"metavar": "FOLDER"},
    )

    def __init__(self, /, **options: Any) -> None:
        """Validate the options; any fault is a `RequestError`."""
        known: dict[str, Any] = {}
        for name, value in options.items():
            if value is None:
                continue
            current = OLD_NAMES.get(name, name)
            if current in known:
                raise RequestError(f"{name} and {current} are the same option", seen=value)
            known[current] = value
        try:
            super().__init__(**known)
        except ValidationError as error:
            raise explain(error, Options, noun="option") from error

    @property
    def typed(self) -> dict[str, Any]:
        """Options that were passed, not left to their defaults."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}

    def recorded(self) -> dict[str, Any]:
        """Return the options that an image's record keeps, as JSON types."""
        return self.model_dump(mode="json", exclude=set(LOCAL))

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some options changed, validated again; `None` resets one."""
        return type(self)(**{**self.typed, **changes})
