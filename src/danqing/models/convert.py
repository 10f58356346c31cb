"""Writes a checkpoint in another layout or dtype, one tensor in memory at a time."""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from danqing import models
from danqing.atomic import sweep, sync, sync_folder, temporary_folder
from danqing.errors import OutputError, RequestError
from danqing.networks.loading import changed, joined, shapes_of
from danqing.weights import QUANTISED
from danqing.weights.places import free_bytes
from danqing.weights.writer import Planned, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from danqing.models.base import ModelSpec
    from danqing.models.model import Model
    from danqing.networks.loading import Piece, Row
    from danqing.weights import Checkpoint, Component, TensorEntry

KEEP = "keep"
INT8 = "int8"
"""Matrices of blocks in int8 with a scale for each row, as compressed-tensors writes them, but for
the autoencoder's; the rest in bfloat16."""
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CHOICES = (KEEP, *DTYPES, INT8)
_TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
SHARD_BYTES = 10 * 10**9
"""As diffusers and transformers divide their files."""
_RELEASE_BYTES = 2**28
SMALL_FILES = (
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "scheduler_config.json",
)  # fmt: skip


@dataclass(kw_only=True)
class TargetFile:
    """One file of tensors to be written.

    Attributes:
        path: within the target folder.
        tensors: what is in it.
        metadata: of its header.
        sharded: whether it is divided when it is large.
    """

    path: str
    tensors: list[Planned]
    metadata: dict[str, str] = field(default_factory=dict)
    sharded: bool = False


@dataclass(kw_only=True)
class TargetLayout:
    """Everything a layout consists of.

    Attributes:
        files: of tensors.
        configs: JSON tables by path.
        copies: source folders of small files, by the folder they go to.
    """

    files: list[TargetFile]
    configs: Mapping[str, Mapping[str, Any]]
    copies: Mapping[str, Path]


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
        layout: one of those the model's family can write.
        dtype: `keep`, one of `DTYPES`, or `int8`.
        on_bytes: told the bytes written so far and in all.

    Raises:
        RequestError: there is no such layout or dtype, or a quantised tensor would have to be kept.
        OutputError: the target exists, or cannot be written.
        CheckpointError: the checkpoint is not sound.
    """
    if dtype not in _CHOICES:
        raise RequestError("there is no such dtype", seen=dtype, allowed=", ".join(_CHOICES))
    sweep(target.parent)  # a run that was killed when it was done may have left its temporary
    if target.exists():
        raise OutputError("the target exists already", seen=target, allowed="a new folder")
    spec = models.identify(checkpoint)
    model = models.open_model(checkpoint, spec)
    family = _writer(spec)
    if layout not in family.LAYOUTS:
        raise RequestError(
            "there is no such layout to write", seen=layout, allowed=", ".join(family.LAYOUTS)
        )
    plan: TargetLayout = family.LAYOUTS[layout](model, dtype)
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


def _writer(spec: ModelSpec) -> Any:
    """Return the module of a family that writes its layouts.

    Raises:
        RequestError: the family has none.
    """
    package = models.FAMILIES[spec.family]
    if importlib.util.find_spec(f"{package}.writing") is None:
        raise RequestError(
            f"danqing cannot convert {spec.title}",
            seen=f"the family {spec.family}, which writes no layout",
            allowed=", ".join(
                family
                for family, home in models.FAMILIES.items()
                if importlib.util.find_spec(f"{home}.writing") is not None
            ),
        )
    return importlib.import_module(f"{package}.writing")


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


# --- tensors -------------------------------------------------------------------------------------


class Source:
    """One network of an opened model, tensor by tensor under its module's names."""

    def __init__(self, model: Model, name: str, dtype: str) -> None:
        """Match the module's tensors with the files'; nothing is read."""
        self._component: Component = model.checkpoint.component(name)
        module, pieces = model.matched(name)
        self.shapes = shapes_of(module)
        self._pieces: Mapping[str, Piece] = pieces
        self._dtype = dtype

    def planned(self, name: str, row: Row) -> list[Planned]:
        """Return the tensor that a row of a key map makes of the module's, and its scales."""
        dtype = self._dtype_of(row.targets)
        first = self.shapes[row.targets[0]]
        rows = (sum(self.shapes[target][0] for target in row.targets),) if first else ()
        tail = (1, 1) if row.change == "conv_to_linear" else ()
        shape = (*rows, *first[1:], *tail)
        if dtype != "I8":
            return [Planned(name, dtype, shape, lambda: self._make(row, dtype))]
        scale = f"{name.removesuffix('.weight')}.weight_scale"
        return [
            Planned(name, "I8", shape, lambda: _quantised(self._make(row, "F32"))[0]),
            Planned(scale, "F32", (*rows, 1), lambda: _quantised(self._make(row, "F32"))[1]),
        ]

    def _make(self, row: Row, dtype: str) -> torch.Tensor:
        tensors = {}
        for target in row.targets:
            piece = self._pieces[target]
            tensor = self._component.read(piece.source, piece.start, piece.stop)
            # of fp8, torch moves nothing but the bytes
            cast = tensor.to(_TORCH[dtype]) if dtype in _TORCH else tensor.view(torch.uint8)
            tensors[target] = changed(cast, piece.change)
        return joined(row, tensors)

    def _dtype_of(self, targets: Iterable[str]) -> str:
        targets = list(targets)
        if self._dtype == INT8:
            return "I8" if all(self._is_large(target) for target in targets) else "BF16"
        if self._dtype != KEEP:
            return DTYPES[self._dtype]
        entries = [self._component.entries[self._pieces[target].source] for target in targets]
        if odd := next((entry for entry in entries if _is_reduced(entry)), None):
            raise RequestError(
                "a quantised tensor cannot be kept as it is in another layout",
                seen=f"{odd.name}: {odd.dtype}",
                allowed=f"--dtype {', '.join(DTYPES)}",
            )
        if len({entry.dtype for entry in entries}) > 1:
            raise RequestError(
                "tensors that belong together are of several dtypes",
                seen=", ".join(f"{entry.name}: {entry.dtype}" for entry in entries),
                allowed=f"--dtype {', '.join(DTYPES)}",
            )
        return entries[0].dtype

    def _is_large(self, target: str) -> bool:
        """Say whether a tensor is the matrix of a block, that is in a list of layers.

        The autoencoder has convolutions, and few matrices.
        """
        inside = any(part.isdigit() for part in target.split(".")) and self._component.name != "vae"
        return inside and target.endswith(".weight") and len(self.shapes[target]) == 2  # noqa: PLR2004


def _quantised(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in int8, its largest number of each row 127, and the rows' scales."""
    scales = matrix.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (matrix / scales).round().to(torch.int8), scales


def _is_reduced(entry: TensorEntry) -> bool:
    return entry.dtype in QUANTISED or entry.scale is not None
