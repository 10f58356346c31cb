"""Models: one row a family; which one a checkpoint is, is read from its tensors."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

from danqing import weights
from danqing.errors import CheckpointError, UnknownModelError
from danqing.models import naming
from danqing.models.slots import required_names
from danqing.weights.kinds import KINDS, kind_of_classes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from danqing.models.base import ModelSpec
    from danqing.models.model import Model
    from danqing.models.slots import Slot
    from danqing.weights import Checkpoint, Contents

__all__ = [
    "FAMILIES",
    "identify",
    "make_model",
    "make_model_around",
    "open_checkpoint",
    "open_model",
    "open_parts",
    "parts_of",
    "pipeline_of",
    "slots_of",
]

FAMILIES = {
    "flux1": "danqing.models.flux",
    "deepgen": "danqing.models.deepgen",
    "sd3": "danqing.models.sd3",
}
"""Package of each family. Without torch it has `SLOTS`, `PIPELINE` (the class of its pipeline in a
model_index.json), `MODEL` (module and class of its `Model`), `spec()` of its plainest kind, and
`identify(checkpoint) -> ModelSpec | None`."""


def open_checkpoint(
    path: str | Path,
    components: Mapping[str, str | Path] | None = None,
    *,
    allow_pt: bool = False,
) -> Checkpoint:
    """Find and recognise a checkpoint; reads indexes, configs and headers, no weights.

    Args:
        path: a folder or a file, the name of a model that comes with danqing, or an id of a hub,
            which is looked up in the caches on this disk.
        components: places of single components, which win over what lies at `path`.
        allow_pt: `path` is a file written by `torch.save`, and may be opened (of tensors only).

    Raises:
        CheckpointError: nothing usable is there; the message says what is.
        RequestError: a component name is unknown in this family.
    """
    contents = weights.read_contents(path, components, allow_pt=allow_pt)
    matches = _matches(contents)
    fitting = {name: match for name, match in matches.items() if _fits(name, match)}
    if not fitting:
        return naming.by_kind(contents)
    if len(set().union(*(match.denoisers for match in fitting.values()))) > 1:
        raise naming.several_models(contents)

    def rank(name: str) -> tuple[bool, int, int]:
        match = fitting[name]
        return not _says(name, contents.index), _own_missing(name, match), match.misfit

    best = min(fitting, key=rank)
    return fitting[best].checkpoint(best)


def open_parts(path: str | Path) -> Checkpoint:
    """Open a file or a folder that is one component of a model, or some, but no whole model.

    Raises:
        CheckpointError: nothing is recognised there.
    """
    contents = weights.read_parts(path)
    fitting = {name: match for name, match in _matches(contents).items() if not match.unused}
    if not fitting:
        return naming.by_kind(contents)

    def rank(name: str) -> tuple[int, int]:
        match = fitting[name]
        return _own_missing(name, match) if match.denoisers else 0, -match.named_folders

    best = min(fitting, key=rank)
    return fitting[best].checkpoint(best)


def _matches(contents: Contents) -> dict[str, naming.Match]:
    given = naming.given_parts(contents.places)
    return {
        name: naming.Match(contents=contents, slots=_package(name).SLOTS, given=given)
        for name in FAMILIES
    }


def _fits(name: str, match: naming.Match) -> bool:
    """Say whether a checkpoint is of a family: by its denoiser, or by its index if it lacks one."""
    return bool(match.denoisers) or (match.unknown_denoiser and _says(name, match.contents.index))


def _says(name: str, index: Mapping[str, Any]) -> bool:
    return _package(name).PIPELINE in str(index.get("_class_name"))


def _own_missing(name: str, match: naming.Match) -> int:
    """Return how many components are missing whose kind no other family has."""
    others = {slot.kind for other in FAMILIES if other != name for slot in _package(other).SLOTS}
    return sum(slot.kind not in others for slot in match.missing)


def _package(family: str) -> Any:
    return importlib.import_module(FAMILIES[family])


def identify(checkpoint: Checkpoint) -> ModelSpec:
    """Say which model a checkpoint is.

    Raises:
        UnknownModelError: none that danqing knows.
        danqing.errors.CheckpointIncompleteError: the component that would tell is missing.
    """
    if checkpoint.family:
        spec: ModelSpec | None = _package(checkpoint.family).identify(checkpoint)
        if spec is not None:
            return _named(spec, checkpoint.name)
    raise _unknown(checkpoint)


def _unknown(checkpoint: Checkpoint) -> CheckpointError:
    """Return the error for a checkpoint of no family; it names a model that is recognised."""
    says = checkpoint.index.get("_class_name")
    seen = f"{checkpoint.path}: {says or ', '.join(checkpoint.components) or 'no components'}"
    for title in _titles(checkpoint):
        return UnknownModelError(
            f"these are the weights of {title}, which danqing does not support yet",
            seen=seen,
            allowed=", ".join(FAMILIES),
        )
    for error in checkpoint.broken.values():
        return error
    return UnknownModelError(
        "the weights are of a model danqing does not know",
        seen=seen,
        allowed=", ".join(FAMILIES),
    )


def _titles(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield names of models without a family that denoisers or the index are of."""
    known = {slot.kind for family in FAMILIES for slot in _package(family).SLOTS}
    for part in checkpoint.components.values():
        kind = KINDS.get(part.kind)  # raises: the file is damaged
        if kind is not None and kind.denoiser and kind.name not in known:
            yield kind.title
    rows = checkpoint.index.values()
    classes = [word for row in rows for word in (row if isinstance(row, list) else [row])]
    kind = kind_of_classes(str(word) for word in classes)
    if kind is not None and kind.name not in known:
        yield kind.title


def _named(spec: ModelSpec, name: str | None) -> ModelSpec:
    """Call a model that comes with danqing by its own name; its architecture stays as it is."""
    if name is None:
        return spec
    return dataclasses.replace(spec, own_name=name, title=f"{name} (a small {spec.title})")


def parts_of(spec: ModelSpec) -> tuple[str, ...]:
    """Return the components a model of this family cannot do without; needs no torch."""
    return required_names(slots_of(spec))


def slots_of(spec: ModelSpec) -> tuple[Slot, ...]:
    """Return the components of this family and what each one is for; needs no torch."""
    slots: tuple[Slot, ...] = _package(spec.family).SLOTS
    return slots


def pipeline_of(spec: ModelSpec) -> str:
    """Return the class of this family's pipeline in a model_index.json."""
    pipeline: str = _package(spec.family).PIPELINE
    return pipeline


def make_model(checkpoint: Checkpoint, spec: ModelSpec) -> Model:
    """Return the model, nothing of it checked or read yet."""
    module, _, name = _package(spec.family).MODEL.partition(":")
    model: Model = getattr(importlib.import_module(module), name)(checkpoint, spec)
    return model


def make_model_around(checkpoint: Checkpoint) -> Model:
    """Return a model of the family that has these components, to check them alone.

    Raises:
        UnknownModelError: no family has.
    """
    if not checkpoint.family:
        raise _unknown(checkpoint)
    return make_model(checkpoint, _package(checkpoint.family).spec())


def open_model(checkpoint: Checkpoint, spec: ModelSpec) -> Model:
    """Return the model with its tensors' names and shapes checked; no weights are read."""
    model = make_model(checkpoint, spec)
    model.check()
    return model
