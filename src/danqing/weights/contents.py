"""What lies at a place, before a family gives names to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from danqing.errors import CheckpointError
    from danqing.weights.checkpoint import Adapter, Component


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Components at a place: named by their folders, or recognised by their kinds alone.

    Attributes:
        path: the place, absolute.
        layout: name of the layout it is in.
        components: those that have names, by name.
        loose: those that a family names by their kinds.
        index: the model's own index file (`model_index.json`), if the layout has one.
        places: of components that lie elsewhere, by the names the user gave them.
        broken: components that cannot be read, and why.
        unread: files and folders beside the others that cannot be read, and why.
        damaged: folders of a known kind among these, by kind; an error if nothing else is of it.
        adapters: of a component of some kind, by kind.
        name: what it is called, if it is a model that comes with danqing.
    """

    path: Path
    layout: str
    components: Mapping[str, Component] = field(default_factory=dict)
    loose: tuple[Component, ...] = ()
    index: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, Path] = field(default_factory=dict)
    broken: Mapping[str, CheckpointError] = field(default_factory=dict)
    unread: Mapping[Path, CheckpointError] = field(default_factory=dict)
    damaged: Mapping[str, Path] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[str, Adapter]] = field(default_factory=dict)
    name: str | None = None
