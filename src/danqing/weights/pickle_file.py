"""A file written by `torch.save`, opened only when the user names it and says that it may be.

torch's loader with `weights_only` builds tensors and plain containers and refuses all else, but it
is still an interpreter of somebody else's program; so danqing opens no other pickle at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from danqing.errors import CheckpointDamagedError, UnsafeFileError
from danqing.weights.tensor_file import TensorEntry, TensorFile

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_WRAPPERS = ("state_dict", "module", "model")
"""Keys under which training programs put the tensors, one inside the other."""
_DEPTH = 3
_SAFETENSORS = (".safetensors", ".sft")


class PickleFile(TensorFile):
    """One file of tensors, mapped where torch can.

    Raises:
        UnsafeFileError: on first use: it holds more than tensors.
        CheckpointDamagedError: on first use: it cannot be read, or holds no tensors.
    """

    def __init__(self, path: Path) -> None:
        """Keep the place; nothing is read."""
        super().__init__(path)
        self._tensors: dict[str, torch.Tensor] | None = None

    def _parse(self, file: BinaryIO) -> tuple[dict[str, object], dict[str, TensorEntry]]:  # noqa: ARG002
        return {}, {name: _entry(name, tensor, self.path) for name, tensor in self._loaded.items()}

    def read(self, entry: TensorEntry, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows, mapped from disk."""
        tensor = self._loaded[entry.name]
        return tensor[start:stop] if tensor.ndim else tensor

    def span(self, entry: TensorEntry, start: int = 0, stop: int | None = None) -> None:  # noqa: ARG002
        """Where a tensor lies in the file is torch's business."""
        return

    def decode(
        self,
        entry: TensorEntry,
        data: torch.Tensor,
        rows: int,
        *,
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Never asked for: there are no spans."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the mapping."""
        self._tensors = None

    @property
    def _loaded(self) -> dict[str, torch.Tensor]:
        if self._tensors is None:
            self._tensors = _tensors_in(_load(self.path), self.path)
        return self._tensors


def _load(path: Path) -> object:
    import pickle

    import torch

    if path.suffix in _SAFETENSORS:  # torch decides by the name, and would call another reader
        raise UnsafeFileError(
            "--allow-pt is for a file that torch.save wrote, and this one is named as safetensors",
            seen=path,
            allowed="a file of tensors, named .pt, .pth, .ckpt or .bin",
            hint="if it is a safetensors file, leave out --allow-pt; if it is a pickle, rename it",
        )
    for mmap in (True, False):  # files of before torch 1.6 cannot be mapped
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)  # noqa: TID251
        except pickle.UnpicklingError as error:
            raise UnsafeFileError(
                "the file holds more than tensors, and might run code",
                seen=f"{path}: {_first_line(error)}",
                allowed="a file of tensors, as torch.save writes a state dict",
            ) from error
        except Exception as error:  # a damaged pickle makes torch raise whatever it likes
            if mmap:
                continue
            raise CheckpointDamagedError(
                "the file cannot be read",
                seen=f"{path}: {type(error).__name__}: {str(error)[:200]}",
            ) from error
    raise AssertionError


def _tensors_in(found: object, path: Path) -> dict[str, torch.Tensor]:
    import torch

    for _ in range(_DEPTH):
        if not isinstance(found, Mapping):
            break
        table: Mapping[Any, Any] = found
        tensors = {str(k): v for k, v in table.items() if isinstance(v, torch.Tensor)}
        if tensors:
            return tensors
        found = next((table[key] for key in _WRAPPERS if key in table), None)
    raise CheckpointDamagedError("the file holds no table of tensors", seen=path)


def _entry(name: str, tensor: torch.Tensor, path: Path) -> TensorEntry:
    codes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
    dtype = str(tensor.dtype).removeprefix("torch.")
    size = tensor.numel() * tensor.element_size()
    return TensorEntry(name, codes.get(dtype, dtype), tuple(tensor.shape), path, 0, size)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
