"""Weights files of one network: those of its index, a complete set of shards, or the only one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from danqing.errors import CheckpointDamagedError, CheckpointIncompleteError, UnsafeFileError
from danqing.weights.checkpoint import too_many_tensors
from danqing.weights.files import open_tensors
from danqing.weights.json_file import MAX_INDEX_BYTES, read_json
from danqing.weights.tensor_file import MAX_TENSORS

if TYPE_CHECKING:
    from collections.abc import Iterable

ENDINGS = (".safetensors", ".sft", ".gguf")
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors$")
_MAX_SHARDS = 1000


def weight_files(name: str, folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a folder: those of its index, or the only ones."""
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda path: len(path.name))
    if indexes:
        return _indexed(name, folder, indexes[0])
    found = sorted(folder.glob("*.safetensors"), key=lambda path: (len(path.name), path.name))
    shards = [match for path in found if (match := _SHARD.match(path.name))]
    if shards:
        total = int(shards[0]["total"])
        wanted = [f"{shards[0]['stem']}-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
        return _all_there(name, folder, wanted)
    if found:
        return (found[0],)  # the shortest name: variants (model.fp16.safetensors) come after it
    pickles = sorted(path for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UnsafeFileError(
            f"{name} is there only as a Python pickle, which can run code when it is opened",
            seen=pickles[0],
            allowed="safetensors files",
            hint="get the model's safetensors release",
        )
    raise CheckpointIncompleteError(
        f"{name} has no weights file", seen=folder, allowed="*.safetensors"
    )


def _indexed(name: str, folder: Path, index: Path) -> tuple[Path, ...]:
    table = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise CheckpointDamagedError("the index of shards has no weight_map", seen=index)
    names = sorted(set(table.values()))
    if len(table) > MAX_TENSORS or len(names) > _MAX_SHARDS:
        raise CheckpointDamagedError(
            "the index of shards is too long",
            seen=f"{index}: {len(table)} tensors in {len(names)} files",
            allowed=f"{MAX_TENSORS} tensors in {_MAX_SHARDS} files",
        )
    if odd := [file for file in names if Path(file).name != file]:
        raise CheckpointDamagedError(
            "the index of shards names a file outside its folder", seen=f"{index}: {odd[0][:200]}"
        )
    if odd := [file for file in names if not file.endswith(ENDINGS[:2])]:
        raise CheckpointDamagedError(
            "the index of shards names a file of another format",
            seen=f"{index}: {odd[0][:200]}",
            allowed="*.safetensors",
        )
    files = _all_there(name, folder, names)
    held: dict[str, str] = {}
    for path in files:
        held |= dict.fromkeys(open_tensors(path).entries, path.name)
        if len(held) > MAX_TENSORS:
            raise too_many_tensors(name, folder)
    wrong = sorted(tensor for tensor, file in table.items() if held.get(tensor) != file)
    if wrong:
        raise CheckpointIncompleteError(
            f"the shards of {name} do not hold what their index says",
            seen=f"{len(wrong)} tensors, the first is {wrong[0]} in {table[wrong[0]]}",
            hint="the shards are of different releases; download them again",
        )
    return files


def _all_there(name: str, folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    files = tuple(folder / file for file in names)
    if missing := [path.name for path in files if not path.is_file()]:
        raise CheckpointIncompleteError(
            f"{len(missing)} of {len(files)} weights files of {name} are missing",
            seen=f"{folder}: no {', '.join(missing)}",
            hint="the download is not complete; finish it",
        )
    return files
