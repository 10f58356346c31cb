"""A GGUF file: its header, read and distrusted before any weight is; its tensors, widened.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A magic word, counts, metadata as
typed key-value pairs, a table of tensors, then the data. Rows are stored in blocks of a fixed
number of elements; dimensions are listed from the fastest to the slowest.

The header is parsed here, because a hostile one must end in an error in bounded time and memory;
the blocks are unpacked as the library gguf does it, or by it.
"""

from __future__ import annotations

import math
import os
import struct
from typing import TYPE_CHECKING, Any, BinaryIO

from danqing.errors import CheckpointDamagedError
from danqing.files import open_regular
from danqing.weights.tensor_file import MAX_SIDE, MAX_TENSORS, TensorEntry, TensorFile

if TYPE_CHECKING:
    from pathlib import Path

    import torch

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 100_000_000
"""As for safetensors; the largest part is a tokenizer's vocabulary."""
MAX_DIMENSIONS = 4
"""Of ggml itself."""
MAX_NAME_BYTES = 65_535
"""The format's limit for keys."""
MAX_PAIRS = 10_000
MAX_TEXTS = 1_000_000
"""Of all arrays together: vocabularies and merges, which are read one by one."""
_KEPT_ITEMS = 64
"""Longer arrays in the metadata (vocabularies) are stepped over."""
_LEAST_TENSOR_BYTES = 24
_LEAST_PAIR_BYTES = 13
_ALIGNMENT = 32

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
    28: ("F64", 1, 8), 30: ("BF16", 1, 2),
}  # fmt: skip
"""ggml's number of a type: its name, the elements of a block and the block's bytes."""
QUANTISED = frozenset(name for name, elements, _ in TYPES.values() if elements > 1)
_NUMBER_OF = {name: number for number, (name, _, _) in TYPES.items()}
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class GgufFile(TensorFile):
    """One GGUF file.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointDamagedError: not a whole GGUF file; or it has tensors in a type that danqing
            cannot unpack.
    """

    def __init__(self, path: Path) -> None:
        """Keep the place; nothing is read."""
        super().__init__(path)
        self._bytes: Any = None

    def _parse(self, file: BinaryIO) -> tuple[dict[str, object], dict[str, TensorEntry]]:
        return _Reader(file, self.path).header()

    def read(self, entry: TensorEntry, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows; F32, F16, BF16 mapped from disk, all others widened to float32."""
        import numpy as np
        import torch

        if self._bytes is None:
            try:
                with open_regular(self.path) as file:
                    self._bytes = np.memmap(file, dtype=np.uint8, mode="c")
            except (OSError, ValueError) as error:
                raise CheckpointDamagedError(
                    "the file changed, or became unreadable, after it was checked",
                    seen=f"{self.path}: {error}",
                ) from error
        rows = entry.shape[0] if entry.shape else 1
        first, last = start, rows if stop is None else stop
        row_bytes = entry.size_bytes // max(rows, 1)
        data = self._bytes[entry.start + first * row_bytes : entry.start + last * row_bytes]
        if len(data) != (last - first) * row_bytes:
            raise CheckpointDamagedError(
                "the file became shorter after it was checked", seen=f"{self.path}: {entry.name}"
            )
        return self.decode(entry, torch.from_numpy(np.asarray(data)), last - first)

    def decode(
        self,
        entry: TensorEntry,
        data: torch.Tensor,
        rows: int,
        *,
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """View bytes as F32, F16 or BF16; widen all others to float32, or bfloat16 if wanted."""
        import torch

        from danqing.weights.unpacking import by_block

        shape = (rows, *entry.shape[1:]) if entry.shape else ()
        if entry.dtype not in QUANTISED:
            kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
            dtype = kind.get(entry.dtype, torch.float64)
            if data.data_ptr() % dtype.itemsize:
                data = data.clone()
            return data.view(dtype).reshape(shape)
        number = _NUMBER_OF[entry.dtype]
        _, elements, size = TYPES[number]
        found = by_block(data, number, elements, len(data) // size, dtype or torch.float32, out=out)
        if found is not None:
            return found.reshape(shape)
        values = _dequantise(data.numpy().reshape(-1, _bytes_of_row(entry)), entry.dtype)
        return torch.from_numpy(values).reshape(shape)

    def close(self) -> None:
        """Let go of the mapping."""
        self._bytes = None


def _bytes_of_row(entry: TensorEntry) -> int:
    """Return the bytes of what is quantised as one: a run along the last dimension."""
    _, block, size = TYPES[_NUMBER_OF[entry.dtype]]
    return entry.shape[-1] // block * size if entry.shape[-1] % block == 0 else entry.size_bytes


def _dequantise(data: Any, dtype: str) -> Any:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(data, GGMLQuantizationType(_NUMBER_OF[dtype]))


class _Reader:
    """Reads a header from its beginning; every count is checked against the bytes there are."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = os.fstat(file.fileno()).st_size
        self._place = 0
        self._texts = 0

    def header(self) -> tuple[dict[str, object], dict[str, TensorEntry]]:
        if self._take(4) != MAGIC:
            raise self._damaged("the file is no GGUF file")
        version = self._number("<I")
        if version not in VERSIONS:
            raise self._damaged(
                "the GGUF file has a version danqing does not read", f"version {version}"
            )
        tensors, pairs = self._number("<Q"), self._number("<Q")
        self._plausible(tensors, _LEAST_TENSOR_BYTES, "tensors", MAX_TENSORS)
        self._plausible(pairs, _LEAST_PAIR_BYTES, "pairs of metadata", MAX_PAIRS)
        metadata: dict[str, object] = {}
        for _ in range(pairs):
            key = self._string(MAX_NAME_BYTES)
            if key in metadata:
                raise self._damaged("a key of the metadata appears twice", key[:200])
            metadata[key] = self._value(self._number("<I"))
        rows = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise self._damaged("the alignment is impossible", str(alignment)[:200])
        start = -(-self._place // alignment) * alignment
        return metadata, self._entries(rows, start, metadata)

    def _entries(
        self,
        rows: list[tuple[str, tuple[int, ...], int, int]],
        start: int,
        metadata: dict[str, Any],
    ) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        end = start
        for name, shape, number, offset in rows:
            if number not in TYPES:
                raise self._damaged(
                    "a tensor is in a type danqing cannot unpack",
                    f"{name[:200]}: ggml type {number}",
                    allowed=", ".join(row[0] for row in TYPES.values()),
                )
            dtype, block, size = TYPES[number]
            elements = math.prod(shape)
            if block > 1 and (not shape or shape[-1] % block):
                raise self._damaged(
                    "the rows of a tensor are no whole blocks", f"{name[:200]}: {dtype}, {shape}"
                )
            length = elements // block * size
            if name in entries:
                raise self._damaged("a tensor appears twice", name[:200])
            if start + offset < end:
                raise self._damaged("the tensors overlap or are out of order", name[:200])
            end = start + offset + length
            if end > self._size:
                raise self._damaged(
                    "the file is cut short",
                    f"{self._size} bytes, and {name[:200]} ends at {end}",
                    hint="download the file again",
                )
            whole = self._original_shape(name, shape, metadata)
            entries[name] = TensorEntry(name, dtype, whole, self._path, start + offset, end)
        return entries

    def _original_shape(
        self, name: str, shape: tuple[int, ...], metadata: dict[str, Any]
    ) -> tuple[int, ...]:
        """Return the shape before a tensor was reshaped to have rows of whole blocks (city96)."""
        original = metadata.get(f"comfy.gguf.orig_shape.{name}")
        if original is None:
            return shape
        whole = isinstance(original, list) and all(
            type(side) is int and side > 0 for side in original
        )
        if not whole or math.prod(original) != math.prod(shape):
            raise self._damaged("a tensor's original shape is impossible", f"{name[:200]}")
        return tuple(original)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(MAX_NAME_BYTES)
        count = self._number("<I")
        if count > MAX_DIMENSIONS:
            raise self._damaged("a tensor has too many dimensions", f"{name[:200]}: {count}")
        shape = tuple(self._number("<Q") for _ in range(count))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        if any(not 0 < side <= MAX_SIDE for side in shape):
            raise self._damaged("a tensor is impossible", f"{name[:200]}: {shape}")
        return name, shape, number, offset

    def _value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string(MAX_HEADER_BYTES)
        if kind != _ARRAY:
            raise self._damaged("a value of the metadata has no known type", str(kind))
        inner, count = self._number("<I"), self._number("<Q")
        if inner == _STRING:
            self._texts += count
            self._plausible(count, 8, "texts", MAX_TEXTS - self._texts + count)
            kept = [self._string(MAX_HEADER_BYTES) for _ in range(count)]
            return kept if count <= _KEPT_ITEMS else None
        if inner not in _SCALARS:
            raise self._damaged("an array of the metadata has no known type", str(inner))
        width = struct.calcsize(_SCALARS[inner])
        self._plausible(count, width, "values", MAX_HEADER_BYTES)
        if count <= _KEPT_ITEMS:
            return [self._number(_SCALARS[inner]) for _ in range(count)]
        self._take(count * width)
        return None

    def _string(self, limit: int) -> str:
        length = self._number("<Q")
        if length > limit:
            raise self._damaged("a text in the header is impossibly long", f"{length} bytes")
        return self._take(length).decode("utf-8", "replace")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> bytes:
        if self._place + count > MAX_HEADER_BYTES:
            raise self._damaged("the header is impossibly long", f"{self._place + count} bytes")
        data = self._file.read(count)
        if len(data) != count:
            raise self._damaged("the file is cut short", f"{self._size} bytes", "download it again")
        self._place += count
        return data

    def _plausible(self, count: int, least: int, what: str, most: int) -> None:
        """Compare a count with the bytes there are, and, since a file may be sparse, a limit."""
        if count > (self._size - self._place) // least:
            raise self._damaged("the header promises more than the file holds", f"{count} {what}")
        if count > most:
            raise self._damaged(
                "the header is impossibly long", f"{count} {what}", allowed=f"{most} {what}"
            )

    def _damaged(
        self, what: str, seen: str = "", hint: str | None = None, *, allowed: str | None = None
    ) -> CheckpointDamagedError:
        place = f"{self._path}: {seen}" if seen else str(self._path)
        return CheckpointDamagedError(what, seen=place, allowed=allowed, hint=hint)
