"""A checkpoint: components by name, each with its config and its tensors, whatever the layout."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from danqing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointIncompleteError,
)
from danqing.files import open_regular
from danqing.weights.files import open_tensors
from danqing.weights.gguf_file import MAGIC
from danqing.weights.kinds import FOREIGN, KINDS, recognise
from danqing.weights.markers import check_markers
from danqing.weights.quantised import BYTES, join_scales
from danqing.weights.ranges import Span
from danqing.weights.tensor_file import FLOAT_DTYPES, MAX_TENSORS, TensorEntry, TensorFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

_FINGERPRINT_BLOCKS = 16
_FINGERPRINT_BLOCK_BYTES = 4096
_MERGED_AT_ONCE = 2**22
"""Numbers of a weight that an adapter is added to in one piece."""
_START = 2**20
_WITHOUT_LENGTH = (MAGIC, b"PK", b"\x80")
"""What GGUF files and pickles begin with."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A low-rank change of one weight: `scale * high @ low` is added to it.

    Attributes:
        file: where both are.
        low: (rank, columns), or that turned on its side.
        high: (rows, rank), or that turned on its side.
        turned: whether both are stored on their side, as an embedding's are.
        scale: of the product.
    """

    file: TensorFile
    low: TensorEntry
    high: TensorEntry
    turned: bool
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes."""
        axis = 1 if self.turned else 0
        return self.high.shape[axis], self.low.shape[1 - axis]

    def added_to(self, rows: torch.Tensor, start: int, stop: int | None) -> torch.Tensor:
        """Return rows of the weight, changed in float32 and rounded once.

        A part at a time: the float32 copies of a large matrix are memory that no plan counts.
        """
        import torch

        low, high = (self.file.read(entry).float() for entry in (self.low, self.high))
        if self.turned:
            low, high = low.T, high.T
        merged, high = torch.empty_like(rows), high[start:stop]
        count = max(1, _MERGED_AT_ONCE // low.shape[1])
        for first in range(0, len(rows), count):
            part = slice(first, first + count)
            merged[part] = rows[part].float() + self.scale * (high[part] @ low)
        return merged


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a model on disk: a network's weights, or a folder of small files.

    Attributes:
        name: what the family calls it; of one that no family has named yet, the kind's alias.
        style: whose tensor names it uses: `diffusers`, `transformers`, `bfl` or `llama.cpp`;
            `files` for a component without tensors (tokenizer, scheduler).
        folder: where its small files are.
        files: its files of tensors, in order.
        config: its config file; None where the layout has none.
        prefix: what its tensors' names begin with in the files, where others lie beside them.
        adapters: changes of single weights, by the tensor's name; made when it is read.
        given: an opened file with the component's tensors in it, where their names there differ.
        kinds: kinds it may be, where a reader recognised it; tokenizers may be of several.
        embedded: configs in its file's metadata: JSON, by the name of the component they are for.
    """

    name: str
    style: str
    folder: Path
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] | None = None
    prefix: str = ""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    given: tuple[TensorFile, Mapping[str, TensorEntry]] | None = None
    kinds: tuple[str, ...] = ()
    embedded: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Its kind, read off its tensors if no reader recognised it; empty if that is unknown."""
        if self.kinds or not self.files:
            return next(iter(self.kinds), "")
        row = recognise(self.entries)
        if row is None or row[1].style not in (self.style, FOREIGN):
            return ""
        return row[0].name

    @cached_property
    def _opened(self) -> dict[Path, TensorFile]:
        if self.given is not None:
            return {self.given[0].path: self.given[0]}
        return {path: open_tensors(path) for path in self.files}

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """All tensors by name, without the prefix, from the headers alone."""
        if self.given is not None:
            return dict(self.given[1])
        entries: dict[str, TensorEntry] = {}
        for path, file in self._opened.items():
            found = under(self.prefix, file.entries)
            if twice := entries.keys() & found.keys():
                raise CheckpointDamagedError(
                    f"a tensor of {self.name} lies in two files",
                    seen=f"{min(twice)} in {entries[min(twice)].file.name} and {path.name}",
                    hint="leave only one set of shards in the folder",
                )
            entries |= found
            if len(entries) > MAX_TENSORS:
                raise too_many_tensors(self.name, self.folder)
        check_markers(self._opened, entries, self.prefix)
        return join_scales(entries)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(entry.size_bytes for entry in self.entries.values())

    @property
    def dtype(self) -> str:
        """The dtype most of its bytes are in: PyTorch's name, or else the format's own."""
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            scaled = ", scaled" if entry.scale is not None else ""
            sizes[FLOAT_DTYPES.get(entry.dtype, entry.dtype) + scaled] += entry.size_bytes
        return sizes.most_common(1)[0][0] if sizes else "none"

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return a tensor's rows from `start` to `stop`.

        Mapped from disk, so that no byte is read before it is used; but quantised and scaled
        tensors are widened here, with their scales applied: to `dtype`, or float32. An adapter is
        added to what was widened, in float32, and rounded once.
        """
        entry = self.entries[name]
        adapter = self.adapters.get(name)
        tensor = self._opened[entry.file].read(entry, start, stop)
        widen = entry.scale is not None or dtype is not None or adapter is not None
        if entry.dtype in BYTES and widen:
            import torch

            data = tensor.reshape(-1).view(torch.uint8)
            first = dtype if adapter is None else torch.float32
            tensor = self._widened(entry, data, tuple(tensor.shape), (start, stop), dtype=first)
            if adapter is None:
                return tensor
            return adapter.added_to(tensor, start, stop).to(dtype or torch.float32)
        return tensor if adapter is None else adapter.added_to(tensor, start, stop)

    def span(self, name: str, start: int, stop: int) -> Span | None:
        """Return the bytes of a tensor's rows, or None if they are no plain range of a file."""
        entry = self.entries[name]
        file = self._opened[entry.file]
        place = file.span(entry, start, stop)
        return None if place is None else Span(file.path, file.identity, *place)

    def decode(
        self,
        name: str,
        data: torch.Tensor,
        rows: tuple[int, int],
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what `read` gives for these rows, from the bytes that `span` names.

        A quantised tensor may be widened into `out`: one dimension, of `dtype`.
        """
        start, stop = rows
        entry = self.entries[name]
        adapter = self.adapters.get(name)
        if adapter is not None and entry.dtype not in FLOAT_DTYPES:
            import torch

            wide = self._decoded(entry, data, rows, torch.float32, None)
            return adapter.added_to(wide, start, stop).to(dtype)
        plain = self._decoded(entry, data, rows, dtype, out)
        return plain if adapter is None else adapter.added_to(plain, start, stop)

    def _decoded(
        self,
        entry: TensorEntry,
        data: torch.Tensor,
        rows: tuple[int, int],
        dtype: torch.dtype,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        start, stop = rows
        if entry.dtype in BYTES:
            shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
            return self._widened(entry, data, shape, rows, dtype=dtype, out=out)
        return self._opened[entry.file].decode(entry, data, stop - start, dtype=dtype, out=out)

    def _widened(
        self,
        entry: TensorEntry,
        data: torch.Tensor,
        shape: tuple[int, ...],
        rows: tuple[int, int | None],
        *,
        dtype: torch.dtype | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        import torch

        from danqing.weights.unpacking import by_table

        factor = None if entry.scale is None else self._scales(entry.scale, rows)
        return by_table(data, entry.dtype, shape, factor, dtype or torch.float32, out=out)

    def row_scales(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return a scale for each of these rows of a matrix that is stored in int8, else None."""
        entry = self.entries[name]
        if entry.dtype != "I8" or entry.scale is None or len(entry.shape) != 2:  # noqa: PLR2004
            return None
        if name in self.adapters:
            return None  # the bytes alone are not the weight
        scales = self._scales(entry.scale, (start, stop))
        return scales.clone() if scales.numel() > 1 else scales.repeat(stop - start)

    def _scales(self, scale: TensorEntry, rows: tuple[int, int | None]) -> torch.Tensor:
        """Return the scales of some rows in float32, or the one of all."""
        found = self._opened[scale.file].read(scale).float().reshape(-1)
        return found[slice(*rows)] if found.numel() > 1 else found

    def close(self) -> None:
        """Let go of the mapped files; tensors already handed out stay valid."""
        for file in self._opened.values():
            file.close()


def too_many_tensors(name: str, folder: Path) -> CheckpointDamagedError:
    """Return the error for a component with more tensors than any network has."""
    return CheckpointDamagedError(
        f"{name} has too many tensors", seen=folder, allowed=f"{MAX_TENSORS} in all its files"
    )


def under(prefix: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): entry
        for name, entry in entries.items()
        if name.startswith(prefix)
    }


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's weights, wherever they lie.

    Attributes:
        path: as the user gave it, made absolute.
        layout: name of the layout it was read as.
        components: by the names that the family gives them.
        family: that has such components; empty if none is known.
        kinds: kind of each component that the family has, by name.
        index: the model's own index file (`model_index.json`), if the layout has one.
        overrides: components whose place the user gave, as absolute paths.
        broken: components that are there but cannot be read, and why.
        unread: files beside the one named that cannot be read, and why.
        name: what it is called, if it is one that comes with danqing.
    """

    path: Path
    layout: str
    components: Mapping[str, Component]
    family: str = ""
    kinds: Mapping[str, str] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Path] = field(default_factory=dict)
    broken: Mapping[str, CheckpointError] = field(default_factory=dict)
    unread: Mapping[Path, CheckpointError] = field(default_factory=dict)
    name: str | None = None

    def component(self, name: str) -> Component:
        """Return a component, or say that it is missing and how to name it.

        Raises:
            CheckpointIncompleteError: this checkpoint has no such component.
            CheckpointError: it has, but what lies there cannot be used.
        """
        if name in self.components:
            return self.components[name]
        if name in self.broken:
            raise self.broken[name]
        has = f"{self.path} ({self.layout}): {', '.join(self.components) or 'nothing'}"
        for path, error in self.unread.items():
            has += f"; {path.name} cannot be read: {error.what}"
        raise CheckpointIncompleteError(
            f"the checkpoint has no {name}", seen=has, hint=self._where_to_get(name)
        )

    def _where_to_get(self, name: str) -> str:
        """Say how to name a component, and of the small ones which files they are."""
        hint = f"if it lies elsewhere, say so: --component {name}=PLACE"
        kind = KINDS.get(self.kinds.get(name, ""))
        if kind is None or not kind.files:
            return hint
        return (
            f"{hint}; a folder with {' and '.join(kind.files)}, or tokenizer.json ({kind.source})"
        )

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
    with open_regular(path) as file:
        start = file.read(8)
        # of a file that does not say how long its header is, so much is taken as such
        length = int.from_bytes(start, "little")
        if start.startswith(_WITHOUT_LENGTH):
            length = _START
        digest.update(file.read(length))
        step = max(1, (size - 8 - length) // _FINGERPRINT_BLOCKS)
        for block in range(_FINGERPRINT_BLOCKS):
            file.seek(8 + length + block * step)
            digest.update(file.read(min(step, _FINGERPRINT_BLOCK_BYTES)))
