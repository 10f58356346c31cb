"""Models: one row a family; which one a checkpoint is, is read from its tensors."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING

from danqing.errors import UnknownModelError

if TYPE_CHECKING:
    from danqing.models.base import Model, ModelSpec
    from danqing.models.slots import Slot
    from danqing.weights import Checkpoint

__all__ = [
    "FAMILIES",
    "identify",
    "make_model",
    "make_model_around",
    "open_model",
    "parts_of",
    "slots_of",
]

FAMILIES = {"flux1": "danqing.models.flux", "deepgen": "danqing.models.deepgen"}
"""Package of each family; it has `identify(checkpoint) -> ModelSpec | None`, which needs no torch,
`open_model(checkpoint, spec) -> Model`, `PARTS`, `spec()` of its plainest kind, and
`is_transformer(component)`."""


def identify(checkpoint: Checkpoint) -> ModelSpec:
    """Say which model a checkpoint is.

    Raises:
        UnknownModelError: none that danqing knows.
        danqing.errors.CheckpointIncompleteError: the component that would tell is missing.
    """
    for package in FAMILIES.values():
        spec: ModelSpec | None = importlib.import_module(package).identify(checkpoint)
        if spec is not None:
            return _named(spec, checkpoint.name)
    for error in checkpoint.broken.values():
        raise error
    says = checkpoint.index.get("_class_name")
    raise UnknownModelError(
        "the weights are of a model danqing does not know",
        seen=f"{checkpoint.path}: {says or ', '.join(checkpoint.components) or 'no components'}",
        allowed=", ".join(FAMILIES),
    )


def _named(spec: ModelSpec, name: str | None) -> ModelSpec:
    """Call a model that comes with danqing by its own name; its architecture stays as it is."""
    if name is None:
        return spec
    return dataclasses.replace(spec, own_name=name, title=f"{name} (a small {spec.title})")


def parts_of(spec: ModelSpec) -> tuple[str, ...]:
    """Return the components a model of this family cannot do without; needs no torch."""
    parts: tuple[str, ...] = importlib.import_module(FAMILIES[spec.family]).PARTS
    return parts


def slots_of(spec: ModelSpec) -> tuple[Slot, ...]:
    """Return the components of this family and what each one is for; needs no torch."""
    slots: tuple[Slot, ...] = importlib.import_module(FAMILIES[spec.family]).SLOTS
    return slots


def make_model(checkpoint: Checkpoint, spec: ModelSpec) -> Model:
    """Return the model, nothing of it checked or read yet."""
    model: Model = importlib.import_module(FAMILIES[spec.family]).open_model(checkpoint, spec)
    return model


def make_model_around(checkpoint: Checkpoint) -> Model:
    """Return the model of the first family that has all these components, to check them alone.

    Raises:
        UnknownModelError: no family has.
    """
    for package in FAMILIES.values():
        family = importlib.import_module(package)
        transformer = checkpoint.components.get("transformer")
        if transformer is not None and not family.is_transformer(transformer):
            continue
        if checkpoint.components.keys() <= {*family.PARTS, "scheduler"}:
            model: Model = family.open_model(checkpoint, family.spec())
            return model
    raise UnknownModelError(
        "no model danqing knows has such components",
        seen=f"{checkpoint.path}: {', '.join(checkpoint.components)}",
        allowed=", ".join(FAMILIES),
    )


def open_model(checkpoint: Checkpoint, spec: ModelSpec) -> Model:
    """Return the model with its tensors' names and shapes checked; no weights are read."""
    model = make_model(checkpoint, spec)
    model.check()
    return model
