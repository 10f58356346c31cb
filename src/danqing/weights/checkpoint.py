"""A checkpoint: components by name, each with its config and its tensors, whatever the layout."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from danqing.errors import CheckpointDamagedError, CheckpointIncompleteError
from danqing.weights.safetensors_file import FLOAT_DTYPES, SafetensorsFile, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

_FINGERPRINT_BLOCKS = 16
_FINGERPRINT_BLOCK_BYTES = 4096
MAX_CONFIG_BYTES = 16_000_000


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a model on disk: a network's weights, or a folder of small files.

    Attributes:
        name: diffusers' name: `transformer`, `vae`, `text_encoder`, `tokenizer`, ...
        style: whose tensor names it uses: `diffusers`, `transformers` or `bfl`; `files` for a
            component without tensors (tokenizer, scheduler).
        folder: where its small files are.
        files: its safetensors files, in order.
        config: its config file; None where the layout has none.
    """

    name: str
    style: str
    folder: Path
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] | None = None
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """All tensors by name, from the headers alone."""
        entries: dict[str, TensorEntry] = {}
        for path in self.files:
            found = SafetensorsFile(path).entries
            if twice := entries.keys() & found.keys():
                raise CheckpointDamagedError(
                    f"a tensor of {self.name} lies in two files",
                    seen=f"{min(twice)} in {entries[min(twice)].file.name} and {path.name}",
                    hint="leave only one set of shards in the folder",
                )
            entries |= found
        return entries

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(entry.size_bytes for entry in self.entries.values())

    @property
    def dtype(self) -> str:
        """The dtype most of its bytes are in, by PyTorch's name."""
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            sizes[FLOAT_DTYPES.get(entry.dtype, entry.dtype)] += entry.size_bytes
        return sizes.most_common(1)[0][0] if sizes else "none"

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, mapped from disk: no byte is read before it is used."""
        from safetensors import SafetensorError, safe_open

        path = self.entries[name].file
        try:
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="pt", device="cpu")
            tensor: torch.Tensor = self._handles[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointDamagedError(
                "the file changed, or became unreadable, after it was checked",
                seen=f"{path}: {name}: {error}",
            ) from error
        return tensor

    def close(self) -> None:
        """Let go of the mapped files; tensors already handed out stay valid."""
        self._handles.clear()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's weights, wherever they lie.

    Attributes:
        path: as the user gave it, made absolute.
        layout: name of the layout it was read as.
        components: by diffusers' names.
        index: the model's own index file (`model_index.json`), if the layout has one.
        overrides: components whose place the user gave, as absolute paths.
        name: what it is called, if it is one that comes with danqing.
    """

    path: Path
    layout: str
    components: Mapping[str, Component]
    index: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Path] = field(default_factory=dict)
    name: str | None = None

    def component(self, name: str) -> Component:
        """Return a component, or say that it is missing and how to name it.

        Raises:
            CheckpointIncompleteError: this checkpoint has no such component.
        """
        try:
            return self.components[name]
        except KeyError:
            raise CheckpointIncompleteError(
                f"the checkpoint has no {name}",
                seen=f"{self.path} ({self.layout}): {', '.join(self.components) or 'nothing'}",
                hint=f"if it lies elsewhere, say so: --component {name}=PLACE",
            ) from None

    @cached_property
    def fingerprint(self) -> str:
        """A digest that tells checkpoints apart without reading all of them.

        SHA-256 over, for each weights file in the order of components: size, header, and 16 blocks
        of 4 KiB spread evenly over the file. It notices another fine-tune; it is no proof that
        every byte is the same.
        """
        digest = hashlib.sha256()
        for name in sorted(self.components):
            for path in self.components[name].files:
                _add_fingerprint(digest, path)
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of all mapped files."""
        for component in self.components.values():
            component.close()


def _add_fingerprint(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        digest.update(file.read(length))
        step = max(1, (size - 8 - length) // _FINGERPRINT_BLOCKS)
        for block in range(_FINGERPRINT_BLOCKS):
            file.seek(8 + length + block * step)
            digest.update(file.read(min(step, _FINGERPRINT_BLOCK_BYTES)))


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON file that holds a table.

    Raises:
        CheckpointIncompleteError: it is not there.
        CheckpointDamagedError: it is something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES)  # a longer one is cut, and then no JSON
        table = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointIncompleteError("a config file is missing", seen=path) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointDamagedError(
            "a config file cannot be read", seen=f"{path}: {str(error)[:200]}"
        ) from error
    if not isinstance(table, dict):
        raise CheckpointDamagedError("a config file holds no table", seen=path)
    return table
