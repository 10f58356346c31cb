"""Parts: the components in one file or one flat folder, recognised by their contents alone.

A component is known here by its kind. What it is called is up to the family; until then it bears
the kind's short alias.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from danqing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    UnknownModelError,
)
from danqing.weights.checkpoint import Component, under
from danqing.weights.files import open_tensors
from danqing.weights.json_file import MAX_TOKENIZER_BYTES, parse_table, read_json
from danqing.weights.kinds import (
    FILES,
    KINDS,
    PREFIXES,
    TOKENIZER_FILES,
    TOKENIZERS,
    kind_of_config,
    recognise,
)
from danqing.weights.shards import ENDINGS, weight_files

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.weights.kinds import Kind, Naming
    from danqing.weights.tensor_file import TensorFile

EMBEDDED = "danqing.config"
"""Key of a config in a file's metadata, with the component's name behind it."""


def exists(path: Path) -> bool:
    """Say whether anything has this name: what is no regular file is an error when it is read."""
    return os.path.lexists(path)


def tensor_files(place: Path) -> list[Path]:
    """Return the files of tensors lying directly at a place."""
    if place.is_file():
        return [place]
    return sorted(path for ending in ENDINGS for path in place.glob(f"*{ending}"))


def read_part(path: Path) -> list[Component]:
    """Return the components a file or a flat folder holds; nothing if it is something else.

    Raises:
        CheckpointError: it cannot be read.
    """
    return read_file(path) if path.is_file() else read_folder(path)


def read_file(path: Path) -> list[Component]:
    """Return the components in a file of tensors, recognised by the names of its tensors."""
    file = open_tensors(path)
    parts = []
    for prefix in PREFIXES:
        row = recognise(under(prefix, file.entries))
        if row is not None:
            parts.append(_in_file(*row, file, prefix))
    return parts


def _in_file(kind: Kind, naming: Naming, file: TensorFile, prefix: str) -> Component:
    folder = file.path.parent
    beside = folder / "config.json"
    reads = naming.config == "required" and not prefix and exists(beside)
    mark = f"{EMBEDDED}."
    embedded = {
        key.removeprefix(mark): text
        for key, text in file.metadata.items()
        if key.startswith(mark) and isinstance(text, str)
    }
    return Component(
        name=kind.shown,
        style=naming.style,
        folder=folder,
        files=(file.path,),
        config=read_json(beside) if reads and kind.shown not in embedded else None,
        prefix=prefix,
        kinds=(kind.name,),
        embedded=embedded,
    )


def named(part: Component, name: str) -> Component:
    """Return a component under the name that its family gives it, with its config if it has one.

    Raises:
        CheckpointDamagedError: the config in the file's metadata cannot be read.
    """
    text = part.embedded.get(name)
    if text is None:
        return replace(part, name=name)
    try:
        config = parse_table(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise CheckpointDamagedError(
            f"the config of {name} in the file's metadata is not a JSON table",
            seen=f"{part.files[0]}: {str(error)[:200]}",
        ) from error
    return replace(part, name=name, config=config)


def read_folder(path: Path) -> list[Component]:
    """Return the tokenizer, the schedule and the network that a flat folder holds."""
    parts = [*_tokenizer(path), *_configured(path)]
    has_config, has_weights = exists(path / "config.json"), any(path.glob("*.safetensors*"))
    config = read_json(path / "config.json") if has_config else {}
    expected = kind_of_config(config.get("model_type"))
    if expected is None and not has_weights:
        return parts
    network = read_network(path.name, "transformers", path, optional=not has_config)
    row = recognise(network.entries)
    if row is not None and (has_config or row[1].config == "optional"):
        kind, naming = row
        parts.append(replace(network, name=kind.shown, style=naming.style, kinds=(kind.name,)))
    return parts


def read_network(name: str, style: str, folder: Path, *, optional: bool = False) -> Component:
    """Return a network in a folder of its own; `optional`: whether it may lack a config.

    Raises:
        CheckpointError: files of it are missing, or cannot be read.
    """
    files = weight_files(name, folder)
    config = None if optional else read_json(folder / "config.json")
    return Component(name=name, style=style, folder=folder, files=files, config=config)


def read_small(name: str, folder: Path) -> Component:
    """Return a component of small files without tensors, such as a tokenizer or a schedule."""
    stem = name.split("_", maxsplit=1)[0]  # tokenizer_2 has a tokenizer_config.json
    config = folder / f"{stem}_config.json"
    return Component(
        name=name,
        style=FILES,
        folder=folder,
        config=read_json(config) if exists(config) else None,
    )


def _configured(path: Path) -> list[Component]:
    """Return the components that one config file makes, such as a schedule."""
    return [
        Component(
            name=kind.shown,
            style=FILES,
            folder=path,
            config=read_json(path / kind.config_file),
            kinds=(kind.name,),
        )
        for kind in KINDS.values()
        if kind.config_file and exists(path / kind.config_file)
    ]


# --- tokenizers ----------------------------------------------------------------------------------


def has_tokenizer(folder: Path) -> bool:
    """Say whether a folder holds any file of a tokenizer."""
    return any((folder / file).exists() for file in TOKENIZER_FILES)


def _tokenizer(folder: Path) -> list[Component]:
    """Return the tokenizer in a folder; files alone may leave open which of several kinds it is."""
    kinds = tuple(name for name, kind in TOKENIZERS.items() if _is_tokenizer(kind, folder))
    if not kinds:
        return []
    config = folder / "tokenizer_config.json"
    table = read_json(config) if exists(config) else None
    return [
        Component(name=KINDS[kinds[0]].shown, style=FILES, folder=folder, config=table, kinds=kinds)
    ]


def _is_tokenizer(kind: Kind, folder: Path) -> bool:
    """Say whether a folder holds such a tokenizer, by its files and never by a class's name."""

    def has(files: tuple[str, ...]) -> bool:
        return all((folder / file).is_file() for file in files)

    if has(kind.files):
        return True
    if any(has(other.files) for other in TOKENIZERS.values()):
        return False
    return _vocabulary(folder) == kind.vocabulary


def _vocabulary(folder: Path) -> str | None:
    """Return the kind of model in a folder's tokenizer.json; None if there is none."""
    path = folder / "tokenizer.json"
    if not exists(path):
        return None
    model = read_json(path, MAX_TOKENIZER_BYTES).get("model")
    if not isinstance(model, dict):
        return None
    return str(model.get("type") or ("BPE" if "merges" in model else "Unigram"))


# --- components named by the user ----------------------------------------------------------------


def nothing_at(name: str, place: Path) -> CheckpointNotFoundError:
    """Return the error for a component that is not where the user said."""
    return CheckpointNotFoundError(f"there is nothing at the place of {name}", seen=place)


def read_place(place: Path) -> list[Component]:
    """Return what lies at a place that the user named, if it can be read."""
    try:
        return read_part(place) if place.exists() else []
    except CheckpointError:
        return []  # `read_component` says why, once it is known what should be there


def read_component(name: str, kind: Kind, place: Path) -> list[Component]:
    """Return the component of a kind at a place, and the tokenizer that may lie beside it.

    Raises:
        CheckpointError: it is not there, or cannot be read.
    """
    if not place.exists():
        raise nothing_at(name, place)
    if kind.config_file:
        folder = place if place.is_dir() else place.parent
        config = read_json(folder / kind.config_file)
        return [Component(name=name, style=FILES, folder=folder, config=config, kinds=(kind.name,))]
    if place.is_dir() and kind.namings and not any(place.glob("*.safetensors*")):
        weight_files(name, place)  # raises: says what is missing, or that it is a pickle
    parts = read_part(place)
    fitting = [part for part in parts if kind.name in part.kinds]
    if not fitting:
        if kind.vocabulary:
            raise _not_the_tokenizer(name, kind, place)
        raise UnknownModelError(
            f"this is no {name}",
            seen=f"{place}: {shown(parts) or 'nothing that danqing recognises'}",
        )
    if len(fitting) > 1:
        raise CheckpointError(
            f"there is more than one {name} at this place",
            seen=f"{place}: {', '.join(part.prefix or part.style for part in fitting)}",
        )
    return [*fitting, *(part for part in parts if kind.tokenizer in part.kinds)]


def shown(parts: list[Component]) -> str:
    """Return what components are, for messages."""
    return ", ".join(KINDS[part.kinds[0]].title for part in parts)


def _not_the_tokenizer(name: str, kind: Kind, place: Path) -> UnknownModelError:
    present = [file for file in TOKENIZER_FILES if (place / file).is_file()]
    held = _vocabulary(place) if place.is_dir() else None
    return UnknownModelError(
        f"this is not a {name}",
        seen=f"{place}: {', '.join(present) or 'none of its files'}"
        + (f", a vocabulary of the kind {held[:40]}" if held else ""),
        allowed=f"a folder with {' and '.join(kind.files)}, or a tokenizer.json of the kind "
        f"{kind.vocabulary}",
    )


def config_kind(folder: Path) -> Kind | None:
    """Return the kind of network that a folder's config.json names, if it can be read."""
    try:
        return kind_of_config(read_json(folder / "config.json").get("model_type"))
    except CheckpointError:
        return None
