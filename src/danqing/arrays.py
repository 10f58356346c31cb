"""Tensors as numpy has them, bfloat16 included: what is shown of a run, compared and kept in files.

numpy has no bfloat16; such values are kept as their 16 bits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITS = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int64": "<i8"}
"""Dtypes by PyTorch's names, and how numpy holds their bits, little endian."""


@dataclass(frozen=True)
class Array:
    """One tensor.

    Attributes:
        dtype: PyTorch's name, one of `BITS`.
        bits: its values; of bfloat16 their bits.
    """

    dtype: str
    bits: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides."""
        return tuple(self.bits.shape)

    def values(self) -> NDArray[Any]:
        """Return the values in float64."""
        import numpy as np

        if self.dtype != "bfloat16":
            return self.bits.astype(np.float64)
        wide = self.bits.astype(np.uint32) << np.uint32(16)
        values: NDArray[Any] = wide.view(np.float32).astype(np.float64)
        return values

    def data(self) -> bytes:
        """Return the bytes, row by row, little endian."""
        return self.bits.astype(BITS[self.dtype], copy=False).tobytes()

    @property
    def sha256(self) -> str:
        """Digest of dtype, shape and bytes."""
        head = f"{self.dtype}{list(self.shape)}:".encode()
        return hashlib.sha256(head + self.data()).hexdigest()
