"""The decisions of a plan, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from danqing.options import Options
    from danqing.plan.budget import Placement

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes a model can compute in, and their bytes."""


@dataclass(frozen=True, kw_only=True)
class PlannedComponent:
    """One component's part of the plan.

    Attributes:
        name: of the component.
        stored: dtype of the files.
        dtype: what it computes in.
        bytes: of its weights in this dtype.
        mapped: they are used where they lie on disk; their memory is the system's page cache.
        reason: of the dtype, where it is not the plan's.
        device: where it is not the plan's.
        placement: `resident`, `staged` or `streamed`.
        blocks: that are streamed, or stay while others are streamed.
        staying: names of those that stay.
        arithmetic: `int8` if its blocks compute with bytes, else empty.
        compact: those that stay do so as they are stored, and are widened when they compute.
    """

    name: str
    stored: str
    dtype: str
    bytes: int
    mapped: bool
    reason: str
    device: str = ""
    placement: Placement = "resident"
    blocks: int = 0
    staying: tuple[str, ...] = ()
    arithmetic: str = ""
    compact: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The decisions and their reasons; the engine follows it to the letter."""

    title: str
    layout: str
    path: str
    device: str
    chip: str
    device_reason: str
    dtype: str
    dtype_reason: str
    attention: str
    attention_reason: str
    deterministic: bool
    compiled: str
    fused: tuple[str, ...]
    placement: Placement
    placement_reason: str
    components: tuple[PlannedComponent, ...]
    kept: tuple[str, ...]
    ring_bytes: int
    tile: int
    limit_bytes: int | None
    limit_reason: str
    picture: str
    activation_bytes: Mapping[str, int]
    peak_bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    assumptions: tuple[str, ...]

    @property
    def predicted_peak_bytes(self) -> int:
        """Memory of the worst stage."""
        return max(self.peak_bytes.values())

    def followed(self, options: Options) -> Options:
        """Return the options with the choices made for them that can change the image's bits."""
        return options.replace(
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            fused=",".join(self.fused) or "off",
            tile=str(self.tile or "off"),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return dataclasses.asdict(self)
