"""How a model runs: `Options`; no torch here.

`Options` is the one definition: `danqing.open` takes its fields, the flags of every command that
opens a model are made from them, and the record in an image keeps them. `Plan` resolves them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError

from danqing.errors import RequestError, UnknownSettingError
from danqing.files import expand

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from typing_extensions import Self

OLD_NAMES = {"quantise": "quantize", "compile_with": "compile"}
"""Names that older programs use."""
_SIZE = re.compile(r"\s*\d{1,30}(\.\d{1,30})?\s*[a-zA-Z]*\s*")
"""Stricter than `ByteSize`, which ignores what follows: it reads `1,5GiB` as one byte."""


def _check_size(value: Any) -> Any:
    if isinstance(value, str) and not _SIZE.fullmatch(value):
        raise ValueError
    return value


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

    Frozen and validated once; `None` stands for the default.

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
    )
    memory: Annotated[ByteSize, Field(gt=0), BeforeValidator(_check_size)] | None = Field(
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
        json_schema_extra={"hidden_flags": ["--quantise"]},
    )
    attention: str = Field(
        default="auto",
        description="Attention kernel: auto, torch, native, math, flash, efficient, cudnn; on an "
        "NPU npu or mindie.",
    )
    deterministic: bool = Field(
        default=False, description="Use only kernels that reproduce the same bits."
    )
    compile: str = Field(
        default="off",
        description="Compile the denoiser's blocks: off, inductor; on an NPU npugraph or torchair.",
    )
    fused: str = Field(
        default="auto",
        description="Fused kernels: auto, off, all, or names with commas, such as rms_norm,rope.",
        json_schema_extra={"metavar": "NAMES"},
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
            raise _explain(error.errors(include_url=False)[0]) from error

    @property
    def typed(self) -> dict[str, Any]:
        """Options that were passed, not left to their defaults."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some options changed, validated again; `None` resets one."""
        return type(self)(**{**self.typed, **changes})


def _explain(fault: ErrorDetails) -> RequestError:
    """Turn pydantic's report of a fault into an error in the user's words."""
    name = str(fault["loc"][0])
    seen = str(fault.get("input"))[:80]
    if fault["type"] == "extra_forbidden":
        return UnknownSettingError(
            f"unknown option {name!r}", seen=name, allowed=", ".join(Options.model_fields)
        )
    field = Options.model_fields[name]
    if name == "memory":
        return RequestError("invalid memory size", seen=seen, allowed="8GiB, 12000MB, ...")
    if words := get_args(field.annotation):
        return RequestError(f"unknown {name}", seen=seen, allowed=", ".join(map(str, words)))
    return RequestError(f"invalid {name}", seen=seen, allowed=fault["msg"])
