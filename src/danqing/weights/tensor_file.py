"""What every file of tensors gives, whatever its format: a list of contents, tensors by rows."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from danqing.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from danqing.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes that are read as they are, and PyTorch's names for them."""
MAX_TENSORS = 100_000
"""Of one file, and of one component; DeepGen's language model has 824."""
MAX_SIDE = 2**40


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as a header describes it.

    Attributes:
        name: as the file spells it.
        dtype: as the format spells it: `BF16`, `F8_E4M3`, `Q4_K`, ...
        shape: of the tensor as PyTorch has it.
        file: where it is.
        start: first byte in the file.
        stop: the byte behind the last one.
        scale: what its values are to be multiplied by, of a tensor in fp8 or int8.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    scale: TensorEntry | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a file from another of the same name, and from itself after it was written to."""

    size: int
    inode: int
    modified: int

    @classmethod
    def of(cls, found: os.stat_result) -> Identity:
        """Return the identity of what `os.stat` found."""
        return cls(found.st_size, found.st_ino, found.st_mtime_ns)

    def same_as(self, found: os.stat_result) -> bool:
        """Say whether a file is still the one it was."""
        return self == Identity.of(found)


_Header: TypeAlias = "tuple[dict[str, object], dict[str, TensorEntry], Identity]"


class TensorFile(ABC):
    """One file of tensors; its header is read and checked on first use.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        """Keep the place; nothing is read."""
        self.path = path
        self._read: _Header | CheckpointError | None = None

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Tensors by name."""
        return self._header[1]

    @property
    def metadata(self) -> Mapping[str, object]:
        """Whatever else the header says; long lists are left out."""
        return self._header[0]

    @property
    def identity(self) -> Identity:
        """What the file was when its header was read."""
        return self._header[2]

    @property
    def _header(self) -> _Header:
        if self._read is None:
            try:
                self._read = self._read_header()
            except CheckpointError as error:  # kept as well: a damaged header may be long
                self._read = error
        if isinstance(self._read, CheckpointError):
            raise self._read
        return self._read

    def _read_header(self) -> _Header:
        try:
            with open_regular(self.path) as file:
                identity = Identity.of(os.fstat(file.fileno()))
                return (*self._parse(file), identity)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError("file not found", seen=self.path) from error
        except OSError as error:
            raise CheckpointDamagedError(
                "the file cannot be read", seen=f"{self.path} ({error.strerror or error})"
            ) from error

    @abstractmethod
    def _parse(self, file: BinaryIO) -> tuple[dict[str, object], dict[str, TensorEntry]]:
        """Read and check the header: metadata, and tensors by name."""

    @abstractmethod
    def read(self, entry: TensorEntry, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return a tensor's rows from `start` to `stop`.

        Those in a dtype PyTorch has are mapped from disk: no byte is read before it is used.
        Others are widened to float32.
        """

    def span(
        self, entry: TensorEntry, start: int = 0, stop: int | None = None
    ) -> tuple[int, int] | None:
        """Return the first and last byte of a tensor's rows, or None if they lie otherwise."""
        rows = max(entry.shape[0], 1) if entry.shape else 1
        row = entry.size_bytes // rows
        return entry.start + start * row, entry.start + (rows if stop is None else stop) * row

    @abstractmethod
    def decode(
        self,
        entry: TensorEntry,
        data: torch.Tensor,
        rows: int,
        *,
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what `read` gives for some rows, from their bytes.

        Args:
            entry: the tensor.
            data: uint8, one dimension; what is returned may share its memory.
            rows: how many they are.
            dtype: what a quantised tensor may be widened to at once; else it is float32.
            out: memory that it may be widened into.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the mapping; tensors already handed out stay valid."""
