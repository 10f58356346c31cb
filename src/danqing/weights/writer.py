"""Writes safetensors files tensor by tensor, so that no more than one is in memory.

Format: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danqing.atomic import sync
from danqing.weights.safetensors_file import BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

_ALIGNMENT = 8


@dataclass(frozen=True)
class Planned:
    """One tensor that will be written.

    Attributes:
        name: in the file.
        dtype: as safetensors spells it.
        shape: of the tensor.
        make: returns it, in this dtype and shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


def write(
    path: Path,
    tensors: Sequence[Planned],
    *,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
) -> None:
    """Write a file; the caller sees to it that it does not look whole before it is.

    Args:
        path: where to.
        tensors: what; wide dtypes are put first, so that each begins where it may be mapped.
        metadata: of the header.
        on_bytes: told the bytes of each tensor when it is written.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    ordered = sorted(tensors, key=lambda row: (-BITS[row.dtype], row.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    place = 0
    for row in ordered:
        stop = place + row.size_bytes
        header[row.name] = {
            "dtype": row.dtype, "shape": list(row.shape), "data_offsets": [place, stop],
        }  # fmt: skip
        place = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for row in ordered:
            file.write(_bytes(row))
            on_bytes(row.size_bytes)
        sync(file)


def _bytes(row: Planned) -> memoryview:
    import torch

    tensor = row.make().contiguous()
    if tuple(tensor.shape) != row.shape or tensor.element_size() * 8 != BITS[row.dtype]:
        msg = f"{row.name} was announced as {row.dtype} {row.shape}, not {tensor.dtype}"
        raise RuntimeError(msg)
    return tensor.reshape(-1).view(torch.uint8).numpy().data
