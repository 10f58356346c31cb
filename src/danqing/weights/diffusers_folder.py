"""The diffusers folder: a subfolder a component, called by the component's name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from danqing.errors import CheckpointDamagedError, CheckpointError
from danqing.weights.contents import Contents
from danqing.weights.json_file import read_json
from danqing.weights.kinds import DENOISER_FOLDERS, RELEASED_FOLDERS
from danqing.weights.parts import (
    exists,
    has_tokenizer,
    read_folder,
    read_network,
    read_small,
    tensor_files,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from danqing.weights.checkpoint import Component

DIFFUSERS_FOLDER = "diffusers folder"
INDEX = "model_index.json"
_SMALL = re.compile(r"(Tokenizer(Fast)?|Scheduler|Processor(Fast)?|Extractor)$")


def is_diffusers_folder(folder: Path) -> bool:
    """Say whether a place is a diffusers folder, and not loose files beside the rest of one."""
    if not exists(folder / INDEX):
        return all((folder / name / "config.json").is_file() for name in RELEASED_FOLDERS)
    return any((folder / name).is_dir() for name in DENOISER_FOLDERS) or not tensor_files(folder)


def read_diffusers_folder(folder: Path) -> Contents:
    """Return the components in the subfolders; errors are kept until a component is asked for."""
    index = folder / INDEX
    table = read_json(index) if exists(index) else {}
    components: dict[str, Component] = {}
    broken: dict[str, CheckpointError] = {}
    for name, row in table.items():
        if name.startswith("_") or not isinstance(row, list) or len(row) != 2 or None in row:  # noqa: PLR2004
            continue
        if not re.fullmatch(r"\w+", name):
            raise CheckpointDamagedError("model_index.json names an odd component", seen=name)
        if not (folder / name).is_dir():
            continue  # an error when it is asked for: it may come from --component
        try:
            components[name] = _listed(name, str(row[0]), str(row[1]), folder / name)
        except CheckpointError as error:
            broken[name] = error
    unlisted = [child for child in folder.iterdir() if child.is_dir() and child.name not in table]
    loose = _unlisted(sorted(unlisted), components, broken)
    return Contents(
        path=folder,
        layout=DIFFUSERS_FOLDER,
        components=components,
        loose=tuple(loose),
        index=table,
        broken=broken,
    )


def _listed(name: str, library: str, class_name: str, folder: Path) -> Component:
    if _SMALL.search(class_name):
        return read_small(name, folder)
    return read_network(name, "transformers" if library == "transformers" else "diffusers", folder)


def _unlisted(
    folders: Iterable[Path], components: dict[str, Component], broken: dict[str, CheckpointError]
) -> list[Component]:
    """Return components that the index does not name: some pipelines load them on their own.

    A tokenizer whose kind is not recognised is taken by its folder's name, so that its faults show.
    """
    loose = []
    for folder in folders:
        try:
            parts = read_folder(folder)
            if not parts and has_tokenizer(folder):
                components[folder.name] = read_small(folder.name, folder)
        except CheckpointError as error:
            broken[folder.name] = error
        else:
            loose += parts
    return loose
