"""Layouts: how people's weights lie on disk. One reader for each.

A reader recognises a place by what is in it (index files, tensor names), never by the name of a
folder or file, and returns components by name, or by kind where their family is to name them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from danqing.errors import (
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    RequestError,
    UnknownModelError,
    UnsafeFileError,
)
from danqing.files import expand
from danqing.weights.contents import Contents
from danqing.weights.deepgen_pt import read_deepgen_pt
from danqing.weights.diffusers_folder import (
    DIFFUSERS_FOLDER,
    INDEX,
    is_diffusers_folder,
    read_diffusers_folder,
)
from danqing.weights.files import open_tensors
from danqing.weights.kinds import KINDS
from danqing.weights.loose_files import (
    ALL_IN_ONE,
    BFL_FILES,
    COMFY_FILES,
    GGUF_FILES,
    SINGLE_FILES,
    read_loose_files,
)
from danqing.weights.parts import read_file, read_part, tensor_files
from danqing.weights.places import BUILT_IN, find
from danqing.weights.quantised import refuse_foreign
from danqing.weights.shards import PICKLES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LAYOUTS = (DIFFUSERS_FOLDER, ALL_IN_ONE, GGUF_FILES, COMFY_FILES, BFL_FILES, SINGLE_FILES)
"""Names of the layouts a model is found in, as shown to the user."""
PART = "part of a model"
_SHOWN = 8


def read_contents(
    path: str | Path,
    components: Mapping[str, str | Path] | None = None,
    *,
    allow_pt: bool = False,
) -> Contents:
    """Find and recognise what lies at a place; reads indexes, configs and headers, no weights.

    `danqing.models.open_checkpoint` is the way in for everything else: it finds the family that
    names the components.

    Args:
        path: a folder or a file, the name of a model that comes with danqing, or an id of a hub,
            which is looked up in the caches on this disk.
        components: places of single components, by the names the user gave them.
        allow_pt: `path` is a file written by `torch.save`, and may be opened (of tensors only).

    Raises:
        CheckpointError: nothing usable is there; the message says what is.
    """
    try:
        place = find(path)
        contents = _read_pt(place) if allow_pt else _read(place)
    except OSError as error:  # no permission, a name that is too long, a disk that fails
        raise CheckpointNotFoundError(
            "the path cannot be read", seen=f"{str(path)[:200]} ({error.strerror or error})"
        ) from error
    places = {name: expand(where).absolute() for name, where in (components or {}).items()}
    return replace(contents, places=places)


def read_parts(path: str | Path) -> Contents:
    """Read a file or a folder that is one component of a model, or some, but no whole model.

    Raises:
        CheckpointError: nothing is recognised there.
    """
    place = find(path)
    parts = read_part(place)
    if not parts:
        raise _nothing_recognised(place)
    return Contents(path=place, layout=PART, loose=tuple(parts))


def _read(place: Path) -> Contents:
    if place.name == INDEX:
        place = place.parent
    if place.is_dir() and is_diffusers_folder(place):
        contents: Contents | None = read_diffusers_folder(place)
    else:
        contents = read_loose_files(place)
    if contents is None:
        raise _nothing_recognised(place)
    name = next((name for name, where in BUILT_IN.items() if where == place), None)
    return replace(contents, name=name)


def _read_pt(place: Path) -> Contents:
    """Open the one pickle that the user named; the components it lacks come from elsewhere."""
    if not place.is_file():
        raise RequestError(
            "--allow-pt is for a single file", seen=place, allowed="a file written by torch.save"
        )
    return read_deepgen_pt(place)


def _nothing_recognised(place: Path) -> CheckpointError:
    if place.is_file():
        return _no_model_in(place)
    if (place.parent / INDEX).is_file():
        return CheckpointIncompleteError(
            "this folder is one component of a model",
            seen=place,
            hint=f"give the folder above it: {place.parent}",
        )
    inside = sorted(path.name for path in place.iterdir())
    pickles = [path for pattern in PICKLES for path in place.glob(pattern)]
    if pickles and not tensor_files(place):
        return UnsafeFileError(
            "the folder holds only Python pickles, which can run code when they are opened",
            seen=pickles[0],
            allowed="safetensors files",
        )
    return UnknownModelError(
        "nothing in this folder is laid out in a way danqing knows",
        seen=f"{place}: {', '.join(inside[:_SHOWN]) or 'empty'}"
        + (" ..." if len(inside) > _SHOWN else ""),
        allowed="; ".join(LAYOUTS),
        hint="a diffusers folder has a model_index.json; a BFL folder has flux1-*.safetensors",
    )


def _no_model_in(file: Path) -> CheckpointError:
    entries = open_tensors(file).entries  # raises if it is damaged or foreign
    refuse_foreign(entries)
    if parts := read_file(file):
        name = KINDS[parts[0].kinds[0]].shown
        return CheckpointIncompleteError(
            f"this file is only a {name}, not a whole model",
            seen=file,
            hint=f"give the model's folder, and this file as --component {name}={file}",
        )
    names = list(entries)
    return UnknownModelError(
        "the tensors are of no model danqing knows",
        seen=f"{file}: {len(names)} tensors, such as {', '.join(names[:3])}",
        allowed=", ".join(LAYOUTS),
    )
