"""Writes a checkpoint in another layout or dtype, one tensor in memory at a time."""

from __future__ import annotations

import importlib
import importlib.util
import json
from typing import TYPE_CHECKING, Any

from danqing import models
from danqing.atomic import sweep, sync, sync_folder, temporary_folder
from danqing.errors import OutputError, RequestError
from danqing.models.folder import write_folder
from danqing.models.targets import CHOICES, TargetFile, TargetLayout
from danqing.weights.places import free_bytes
from danqing.weights.writer import Planned, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from danqing.models.base import ModelSpec
    from danqing.weights import Checkpoint

SHARD_BYTES = 10 * 10**9
"""As diffusers and transformers divide their files."""
_RELEASE_BYTES = 2**28
SMALL_FILES = (
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "scheduler_config.json",
)  # fmt: skip


def convert(
    checkpoint: Checkpoint,
    target: Path,
    *,
    layout: str,
    dtype: str,
    on_bytes: Callable[[int, int], None],
) -> None:
    """Write a checkpoint to a new folder.

    Args:
        checkpoint: opened.
        target: a folder that does not exist; it appears when it is complete.
        layout: one of `layouts_of` the model.
        dtype: `keep`, one of `DTYPES`, or `int8`.
        on_bytes: told the bytes written so far and in all.

    Raises:
        RequestError: the layout or dtype is unknown, or a quantised tensor would have to be kept.
        OutputError: the target exists, or cannot be written.
        CheckpointError: the checkpoint is not sound.
    """
    if dtype not in CHOICES:
        raise RequestError("unknown dtype", seen=dtype, allowed=", ".join(CHOICES))
    sweep(target.parent)  # a run that was killed when it was done may have left its temporary
    if target.exists():
        raise OutputError("the target exists already", seen=target, allowed="a new folder")
    spec = models.identify(checkpoint)
    model = models.open_model(checkpoint, spec)
    layouts = layouts_of(spec)
    if layout not in layouts:
        raise RequestError(
            f"danqing cannot write {spec.title} in this layout",
            seen=layout,
            allowed=", ".join(layouts),
        )
    plan = layouts[layout](model, dtype)
    total = sum(row.size_bytes for file in plan.files for row in file.tensors)
    _check_space(target, total)
    done = released = 0

    def progress(count: int) -> None:
        nonlocal done, released
        done += count
        if done - released > _RELEASE_BYTES:  # or every page read stays mapped, and is counted
            checkpoint.close()
            released = done
        on_bytes(done, total)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent) as unfinished:
            folder = unfinished / "whole"  # made with the user's umask; the temporary is private
            folder.mkdir()
            for file in plan.files:
                _write_file(folder, file, progress)
            _write_small(folder, plan)
            folder.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise OutputError(
            "the folder cannot be written", seen=f"{target} ({error.strerror or error})"
        ) from error


def layouts_of(spec: ModelSpec) -> Mapping[str, Callable[[Any, str], TargetLayout]]:
    """Return the layouts that a model can be written in: a diffusers folder, and its family's."""
    package = models.FAMILIES[spec.family]
    own = importlib.util.find_spec(f"{package}.writing") is not None
    special = importlib.import_module(f"{package}.writing").LAYOUTS if own else {}
    return {"diffusers": write_folder, **special}


def _check_space(target: Path, total: int) -> None:
    free = free_bytes(target)
    if free < total:
        raise OutputError(
            "there is not enough free space on the disk",
            seen=f"{free} bytes free at {target.parent}",
            allowed=f"{total} bytes",
        )


def _write_file(folder: Path, file: TargetFile, progress: Callable[[int], None]) -> None:
    path = folder / file.path
    shards = _shards(file.tensors) if file.sharded else [file.tensors]
    if len(shards) == 1:
        write(path, file.tensors, metadata=file.metadata, on_bytes=progress)
        return
    weight_map: dict[str, str] = {}
    for number, rows in enumerate(shards, start=1):
        name = f"{path.stem}-{number:05}-of-{len(shards):05}.safetensors"
        write(path.with_name(name), rows, metadata=file.metadata, on_bytes=progress)
        weight_map |= {row.name: name for row in rows}
    total = sum(row.size_bytes for row in file.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(path.with_name(f"{path.name}.index.json"), index)


def _shards(tensors: Iterable[Planned]) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    held = 0
    for row in tensors:
        if shards[-1] and held + row.size_bytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(row)
        held += row.size_bytes
    return shards


def _write_small(folder: Path, plan: TargetLayout) -> None:
    for path, table in plan.configs.items():
        _write_json(folder / path, table)
    for name, source in plan.copies.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in SMALL_FILES:
            if (source / file).is_file():
                _write_small_file(folder / name / file, (source / file).read_bytes())


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_small_file(path, (json.dumps(table, indent=2) + "\n").encode())


def _write_small_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        sync(file)
