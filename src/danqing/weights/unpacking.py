"""Weights in fewer bits widened to the dtype that computes: fp8 and int8 by table, GGUF by block.

By way of torch's and gguf's own conversions this took longer than the arithmetic of a block that is
streamed (decision 0016). The kernels give the same bits; where they cannot be had, a table of 256
numbers and the library gguf do.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from danqing.processor import compiled

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE = Path(__file__).with_suffix(".cpp")
_TYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}


def by_table(
    data: torch.Tensor,
    kind: str,
    shape: Sequence[int],
    scales: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return numbers of one byte each, multiplied by their scales in float32, rounded once.

    Args:
        data: uint8, one dimension.
        kind: one of `danqing.weights.quantised.BYTES`.
        shape: of the tensor.
        scales: float32, one number, or one for each row; none is 1.
        dtype: wanted.
        out: contiguous, of this many numbers in this dtype, to be filled if that spares a copy.
    """
    table = torch.arange(256, dtype=torch.uint8).view(_TYPES[kind]).float()
    scales = torch.ones(1) if scales is None else scales.float().reshape(-1)
    rows, data = len(scales), data.contiguous()  # with one scale for all, all are one row
    library, target = compiled(SOURCE), dtype if dtype is torch.bfloat16 else torch.float32
    if library is None:
        values = table if rows > 1 else (table * scales).to(target)
        found = values.index_select(0, data.int()).reshape(rows, -1)
        return (found * scales[:, None] if rows > 1 else found).to(dtype).reshape(list(shape))
    if out is None or out.dtype is not target:
        out = torch.empty(math.prod(shape), dtype=target)
    # with one scale for all the rows are only what threads share
    lines = max(rows if rows > 1 else math.prod(shape[:1]), 1)
    sizes = map(ctypes.c_int64, (lines, math.prod(shape) // lines))
    library.danqing_unpack_bytes(
        *map(_at, (data, table, scales)), ctypes.c_int64(int(rows > 1)), _at(out),
        int(target is torch.bfloat16), *sizes,
    )  # fmt: skip
    return out.to(dtype).view(list(shape))


def by_block(
    data: torch.Tensor,
    kind: int,
    elements: int,
    count: int,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return the numbers of blocks of a type of ggml, or None where the kernel cannot.

    Args:
        data: uint8, contiguous.
        kind: ggml's number of the type.
        elements: numbers of a block.
        count: blocks.
        dtype: wanted; float32 comes in place of any but bfloat16.
        out: contiguous, of this many numbers in this dtype, to be filled if that spares a copy.
    """
    library = compiled(SOURCE)
    if library is None:
        return None
    target = dtype if dtype is torch.bfloat16 else torch.float32
    if out is None or out.dtype is not target:
        out = torch.empty(count * elements, dtype=target)
    refused = library.danqing_unpack_blocks(
        kind, _at(data), _at(out), int(target is torch.bfloat16), ctypes.c_int64(count)
    )
    return None if refused else out


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
