"""Slots: the components a family is made of, and what each one is for.

A family declares its slots as data. Everything outside the families asks for a role, such as the
denoiser, and never for the name that one family happens to give it. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Stage = Literal["encode", "denoise", "decode"]
Role = Literal[
    "denoiser", "text encoder", "image encoder", "decoder", "connector", "tokenizer", "schedule"
]

STAGES: tuple[Stage, ...] = ("encode", "denoise", "decode")
"""In the order of the work."""


@dataclass(frozen=True)
class Slot:
    """One use of a component.

    A component with two uses has two slots of the same name: an autoencoder that reads the images
    to edit is an "image encoder" in the stage "encode" and the "decoder" in the stage "decode".

    Attributes:
        name: of the component, as its folder is called in the family's diffusers layout.
        kind: of the network or of the small files.
        role: what it is for.
        stage: which stage computes with it; empty for tokenizers and schedules.
        tokenizer: name of the component that makes this encoder's tokens.
        setting: the request's setting without which this use is skipped; empty if never skipped.
        required: whether the model cannot run without it.
    """

    name: str
    kind: str
    role: Role
    stage: Stage | Literal[""] = ""
    tokenizer: str = ""
    setting: str = ""
    required: bool = True


def names_with_role(slots: Sequence[Slot], role: Role) -> tuple[str, ...]:
    """Return the components with a role, in the order of the slots."""
    return _unique(slot.name for slot in slots if slot.role == role)


def names_in_stage(slots: Sequence[Slot], stage: str, request: object = None) -> tuple[str, ...]:
    """Return the components that a stage computes with.

    Args:
        slots: of the family.
        stage: one of `STAGES`.
        request: with it, uses are skipped whose setting it leaves out.
    """
    return _unique(
        slot.name
        for slot in slots
        if slot.stage == stage
        and (request is None or not slot.setting or getattr(request, slot.setting))
    )


def required_names(slots: Sequence[Slot]) -> tuple[str, ...]:
    """Return the components a model cannot run without, in the order they are checked."""
    return _unique(slot.name for slot in slots if slot.required)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
