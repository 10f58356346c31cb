"""Loose files: components side by side, in files of tensors and in encoders' folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danqing.errors import CheckpointError
from danqing.weights.contents import Contents
from danqing.weights.files import open_tensors
from danqing.weights.gguf_file import GgufFile
from danqing.weights.kinds import KINDS, RELEASED
from danqing.weights.parts import config_kind, read_file, read_part, tensor_files
from danqing.weights.shards import ENDINGS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from danqing.weights.checkpoint import Component

ALL_IN_ONE = "ComfyUI all-in-one file"
GGUF_FILES = "GGUF files"
COMFY_FILES = "ComfyUI files"
BFL_FILES = "BFL files"
SINGLE_FILES = "diffusers files"


def denoisers(parts: list[Component]) -> list[Component]:
    """Return the components that a model is recognised by."""
    return [part for part in parts if KINDS[part.kinds[0]].denoiser]


def layout_of(files: list[list[Component]]) -> str:
    """Return the name of the layout that files of components are in; empty if none is a model's."""
    found = [(part, len(parts) - 1) for parts in files for part in denoisers(parts)]
    if not found:
        return ""
    if any(beside for _, beside in found):
        return ALL_IN_ONE
    if any(isinstance(open_tensors(part.files[0]), GgufFile) for part, _ in found):
        return GGUF_FILES
    if any(part.prefix for part, _ in found):
        return COMFY_FILES
    return BFL_FILES if any(part.style == RELEASED for part, _ in found) else SINGLE_FILES


def read_loose_files(place: Path) -> Contents | None:
    """Return the components that lie side by side at a place, or None if no denoiser does.

    Beside a file that was named, one that cannot be read may be of no concern; it is reported if
    something is missing. What the named file holds is meant, whatever lies beside it.
    """
    own = [read_file(path) for path in tensor_files(place)]
    layout = layout_of(own)
    if not layout:
        return None
    parts = [part for found in own for part in found]
    others: list[Component] = []
    unread: dict[Path, CheckpointError] = {}
    damaged: dict[str, Path] = {}
    for child in _neighbours(place):
        try:
            others += read_part(child)
        except CheckpointError as error:
            unread[child] = error
            if place.is_dir() and (kind := config_kind(child)) is not None:
                damaged[kind.name] = child
    if place.is_file():
        others = _beside(others, parts)
    return Contents(
        path=place, layout=layout, loose=(*parts, *others), unread=unread, damaged=damaged
    )


def _neighbours(place: Path) -> Iterator[Path]:
    """Yield folders of components beside a place's own files, and files beside a named one."""
    folder = place if place.is_dir() else place.parent
    for child in sorted(folder.iterdir()):
        if child.is_dir() or (place.is_file() and child != place and child.suffix in ENDINGS):
            yield child


def _beside(others: list[Component], meant: list[Component]) -> list[Component]:
    """Return the components that do not rival those in a file that was named."""
    kinds = {part.kinds[0] for part in meant}
    return [
        part for part in others if part.kinds[0] not in kinds and not KINDS[part.kinds[0]].denoiser
    ]
