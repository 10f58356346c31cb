"""The header of a safetensors file, read and distrusted before any weight is.

Format: https://huggingface.co/docs/safetensors/index#format. Eight bytes little endian give the
length of a JSON header; then the data, without gaps.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, BinaryIO

from danqing.errors import CheckpointDamagedError, UnsafeFileError
from danqing.files import open_regular
from danqing.weights.json_file import load, refuse_many_values
from danqing.weights.tensor_file import MAX_SIDE, MAX_TENSORS, TensorEntry, TensorFile

if TYPE_CHECKING:
    from pathlib import Path

    import torch

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

MAX_DIMENSIONS = 8
_MAX_VALUES = 16 * MAX_TENSORS
"""Values of a header: a tensor has about ten, and there is a table of texts beside them."""
LENGTH_BYTES = 8

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""PyTorch's names of the dtypes that weights come in."""


class SafetensorsFile(TensorFile):
    """One safetensors file; its header is read and checked on first use.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointDamagedError: not a whole safetensors file; the message says what it is instead.
        UnsafeFileError: it is a pickle.
    """

    def __init__(self, path: Path) -> None:
        """Keep the place; nothing is read."""
        super().__init__(path)
        self._handle: Any = None

    def _parse(self, file: BinaryIO) -> tuple[dict[str, object], dict[str, TensorEntry]]:
        header, data_start, size = _read_header(self.path, file)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise CheckpointDamagedError("the file's metadata is no table", seen=self.path)
        if len(header) > MAX_TENSORS:
            raise _too_many(self.path, len(header))
        entries = {name: _entry(self.path, name, raw, data_start) for name, raw in header.items()}
        _check_coverage(self.path, entries, data_start, size)
        return metadata, entries

    def read(self, entry: TensorEntry, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows of a tensor, mapped from disk."""
        from safetensors import SafetensorError, safe_open

        try:
            if self._handle is None:
                open_regular(self.path).close()  # the library opens whatever lies there
                self._handle = safe_open(self.path, framework="pt", device="cpu")
            tensor: torch.Tensor = self._handle.get_tensor(entry.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointDamagedError(
                "the file changed, or became unreadable, after it was checked",
                seen=f"{self.path}: {entry.name}: {error}",
            ) from error
        whole = not tensor.ndim or (start, stop or tensor.shape[0]) == (0, tensor.shape[0])
        return tensor if whole else tensor[start:stop]

    def decode(
        self,
        entry: TensorEntry,
        data: torch.Tensor,
        rows: int,
        *,
        dtype: torch.dtype | None = None,  # noqa: ARG002
        out: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """View bytes as the tensor's own dtype."""
        import torch

        stored: torch.dtype = getattr(torch, TORCH[entry.dtype])
        if data.data_ptr() % stored.itemsize:
            data = data.clone()
        return data.view(stored).reshape((rows, *entry.shape[1:]) if entry.shape else ())

    def close(self) -> None:
        """Let go of the mapping."""
        self._handle = None


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(512)
    _refuse_foreign(path, start, size)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES or length + 8 > size:
        raise CheckpointDamagedError(
            "the file is cut short, or is no safetensors file",
            seen=f"{path}: {size} bytes, of which the header alone would take {length}",
            hint="download the file again",
        )
    file.seek(8)
    return _parse(path, file.read(length)), 8 + length, size


def _refuse_foreign(path: Path, start: bytes, size: int) -> None:
    """Name the well-known things that are found under a weights file's name."""
    if start[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{":
        return  # a header begins here; the length before it may look like anything
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointDamagedError(
            "the file is a Git LFS pointer, not the weights",
            seen=f"{path}: {size} bytes",
            hint="run 'git lfs pull' in that repository, or download the file itself",
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointDamagedError(
            "the file is a web page, not the weights",
            seen=f"{path}: {size} bytes",
            hint="the download was answered by an error or login page; download it again",
        )
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise UnsafeFileError(
            "the file is a Python pickle, which can run code when it is opened",
            seen=path,
            allowed="safetensors files",
            hint="get the model's safetensors release; DeepGen's own model.pt may be opened, of "
            "tensors only, with --allow-pt",
        )
    if size < LENGTH_BYTES:
        raise CheckpointDamagedError("the file is empty or cut short", seen=f"{path}: {size} bytes")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if (tensors := text.count(b'"data_offsets"')) > MAX_TENSORS:  # before they take memory
        raise _too_many(path, tensors)
    try:
        refuse_many_values(text, _MAX_VALUES)
        header = load(text.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(
            "the header of the safetensors file is not valid JSON",
            seen=f"{path}: {str(error)[:200]}",
            hint="download the file again",
        ) from error
    if not isinstance(header, dict):
        raise CheckpointDamagedError("the header of the safetensors file is no table", seen=path)
    return header


def _too_many(path: Path, count: int) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        "the header lists too many tensors",
        seen=f"{path}: {count} tensors",
        allowed=f"{MAX_TENSORS} tensors",
    )


def _entry(path: Path, name: str, raw: object, data_start: int) -> TensorEntry:
    try:
        return _sane_entry(path, name, raw, data_start)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointDamagedError(
            "the header describes an impossible tensor",
            seen=f"{path}: {name[:200]}: {str(raw)[:200]}",
            hint="download the file again",
        ) from error


def _sane_entry(path: Path, name: str, raw: Any, data_start: int) -> TensorEntry:
    dtype, shape, (start, stop) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError("too many dimensions")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("a negative or fractional number")
    if any(side > MAX_SIDE for side in shape):
        raise ValueError("a side is too long")
    if stop - start != math.prod(shape) * BITS[dtype] // 8:
        raise ValueError("the bytes do not fit the shape")
    return TensorEntry(name, dtype, shape, path, data_start + start, data_start + stop)


def _check_coverage(
    path: Path, entries: dict[str, TensorEntry], data_start: int, size: int
) -> None:
    """Every byte behind the header belongs to exactly one tensor, as the format demands."""
    place = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != place:
            raise CheckpointDamagedError(
                "the header's tensors overlap or leave a gap", seen=f"{path}: {entry.name[:200]}"
            )
        place = entry.stop
    if place != size:
        what = "is cut short" if size < place else "has bytes behind its last tensor"
        raise CheckpointDamagedError(
            f"the file {what}",
            seen=f"{path}: {size} bytes",
            allowed=f"{place} bytes, as its header promises",
            hint="download the file again",
        )
