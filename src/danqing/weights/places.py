"""Where models lie on this disk: by path, by name, or by their id on a hub. Nothing is fetched.

Cache layouts: https://huggingface.co/docs/huggingface_hub/guides/manage-cache for Hugging Face;
ModelScope's were read off its clients: folders `owner/name`, with a dot in a name as three
underscores, and since 1.38 `models/owner--name/snapshots/revision`.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from danqing.cache import caches, in_home
from danqing.errors import CheckpointNotFoundError
from danqing.files import read_text

if TYPE_CHECKING:
    from collections.abc import Iterator

POCKET = "pocket"
"""The model that comes with danqing, and is used where none is named."""
BUILT_IN = {POCKET: Path(__file__).parents[1] / "pocket" / "checkpoint"}
"""Models that come with danqing, by name; a folder of that name on the disk goes first."""
MODELS_VARIABLE = "DANQING_MODELS"
"""Environment variable with folders that hold models, separated as in PATH."""

_ID = re.compile(r"(?P<owner>[\w][\w.-]*)/(?P<name>[\w][\w.-]*)")
_FOLDED = "models--"
_MAX_REVISION_BYTES = 1000
_SCOPE_ROOTS = ("", "models", "hub", "hub/models")


@dataclass(frozen=True)
class Found:
    """A model's place, and what it is called there: an id, or a folder's name."""

    name: str
    path: Path


def find(given: str | Path) -> Path:
    """Return the folder or file that a path, a built-in name or a hub's id stands for.

    Raises:
        CheckpointNotFoundError: there is none; the message lists where it was looked for.
    """
    place = in_home(str(given)).absolute()
    if place.exists():
        return place
    if str(given) in BUILT_IN:
        return BUILT_IN[str(given)]
    if isinstance(given, str) and _ID.fullmatch(given):
        return _find_id(given)
    raise CheckpointNotFoundError(
        "there is nothing at this path",
        seen=given,
        hint="danqing reads weights from this disk and downloads nothing by itself; give the "
        "folder of a downloaded model, its id on a hub (danqing models lists what is here), or the "
        f"name of one that is built in: {POCKET}",
    )


def _find_id(given: str) -> Path:
    searched = list(_places_of(given))
    for place in searched:
        if (path := _snapshot(place)) is not None:
            return path
    raise CheckpointNotFoundError(
        "this model is not on this disk",
        seen=given,
        allowed="a folder or a file, or an id found at one of:\n    "
        + "\n    ".join(str(place) for place in (Path(given).absolute(), *searched)),
        hint=f"danqing pull {given} downloads it; {MODELS_VARIABLE} names more folders to look in",
    )


def _places_of(given: str) -> Iterator[Path]:
    """Yield where a model with this id may be, in the order of precedence."""
    owner, name = given.split("/")
    folded = f"{_FOLDED}{owner}--{name}"
    mangled = name.replace(".", "___")
    for folder in named_folders():
        yield from (folder / owner / name, folder / name, folder / folded)
    yield hugging_face_cache() / folded
    for root in _SCOPE_ROOTS:
        for spelling in dict.fromkeys((name, mangled)):
            yield model_scope_cache() / root / owner / spelling
    for root in _SCOPE_ROOTS:
        yield model_scope_cache() / root / f"{owner}--{name}"


def _snapshot(place: Path) -> Path | None:
    """Return a folder, or of Hugging Face's cache the snapshot meant; None if nothing is there."""
    if not place.is_dir():
        return None
    snapshots = place / "snapshots"
    if not snapshots.is_dir():
        return place
    try:
        main = read_text(place / "refs" / "main", _MAX_REVISION_BYTES).strip()
    except (OSError, ValueError):
        main = ""
    if re.fullmatch(r"[0-9a-f]{40}", main) and (snapshots / main).is_dir():
        return snapshots / main
    if (snapshots / "master").is_dir():  # ModelScope's name for it
        return snapshots / "master"
    return max(
        (path for path in snapshots.iterdir() if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
        default=None,
    )


def named_folders() -> list[Path]:
    """Return the folders named in DANQING_MODELS."""
    parts = os.environ.get(MODELS_VARIABLE, "").split(os.pathsep)
    return [in_home(part).absolute() for part in parts if part]


def hugging_face_cache() -> Path:
    """Return the folder of Hugging Face's cache, by the same variables as its client."""
    if given := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return in_home(given)
    if home := os.environ.get("HF_HOME"):
        return in_home(home) / "hub"
    return caches() / "huggingface" / "hub"


def model_scope_cache() -> Path:
    """Return the folder of ModelScope's cache, by the same variable as its client."""
    given = os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"
    return in_home(given)


def free_bytes(place: Path) -> int:
    """Return what is free on the disk where a place is, or would be."""
    existing = next(path for path in (place, *place.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def all_places() -> Iterator[Found]:
    """Yield every place on this disk that may hold a model, each once."""
    seen: set[Path] = set()
    for found in _all_places():
        real = found.path.resolve()
        if real not in seen:
            seen.add(real)
            yield found


def _all_places() -> Iterator[Found]:
    yield from (Found(name, path) for name, path in BUILT_IN.items())
    for folder in named_folders():
        yield from models_in(folder)
    for child in _folders(hugging_face_cache()):
        if child.name.startswith(_FOLDED):
            yield from _folded(child, child.name.removeprefix(_FOLDED))
    for root in _SCOPE_ROOTS:
        for owner in _folders(model_scope_cache() / root):
            if "--" in owner.name:
                yield from _folded(owner, owner.name)
                continue
            for child in _folders(owner):
                yield Found(f"{owner.name}/{child.name.replace('___', '.')}", child)


def models_in(folder: Path) -> Iterator[Found]:
    """Yield every place in a folder of models that may hold one; their names are their paths."""
    for child in _folders(folder):
        if child.name.startswith(_FOLDED):
            yield from _folded(child, child.name.removeprefix(_FOLDED))
            continue
        yield Found(str(child), child)
        if not _looks_like_a_model(child):  # then it may be an owner's folder
            yield from (Found(str(inner), inner) for inner in _folders(child))
    yield from (Found(str(file), file) for file in _tensor_files(folder))


def _folded(place: Path, name: str) -> Iterator[Found]:
    """Yield the snapshot in a folder whose name has the id folded into it."""
    path = _snapshot(place)
    if path is not None:
        yield Found(name.replace("--", "/", 1), path)


def _looks_like_a_model(place: Path) -> bool:
    return (place / "model_index.json").is_file() or bool(_tensor_files(place))


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def _tensor_files(place: Path) -> list[Path]:
    try:
        return sorted(p for p in place.iterdir() if p.suffix in (".safetensors", ".sft", ".gguf"))
    except OSError:
        return []
