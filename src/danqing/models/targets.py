"""What a layout to be written consists of: files of planned tensors, configs and small files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from danqing.errors import RequestError
from danqing.networks.loading import changed, joined, shapes_of
from danqing.weights import QUANTISED
from danqing.weights.writer import Planned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from danqing.models.model import Model
    from danqing.networks.loading import Piece, Row
    from danqing.weights import Component, TensorEntry

KEEP = "keep"
INT8 = "int8"
"""Matrices of blocks in int8 with a scale for each row, as compressed-tensors writes them, but for
the autoencoder's; the rest in bfloat16."""
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CHOICES = (KEEP, *DTYPES, INT8)
_TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


@dataclass(kw_only=True)
class TargetFile:
    """One file of tensors to be written.

    Attributes:
        path: within the target folder.
        tensors: what is in it.
        metadata: of its header.
        sharded: whether it is divided when it is large.
    """

    path: str
    tensors: list[Planned]
    metadata: dict[str, str] = field(default_factory=dict)
    sharded: bool = False


@dataclass(kw_only=True)
class TargetLayout:
    """Everything a layout consists of.

    Attributes:
        files: of tensors.
        configs: JSON tables by path.
        copies: source folders of small files, by the folder they go to.
    """

    files: list[TargetFile]
    configs: Mapping[str, Mapping[str, Any]]
    copies: Mapping[str, Path]


class Source:
    """One network of an opened model, tensor by tensor under its module's names."""

    def __init__(self, model: Model, name: str, dtype: str) -> None:
        """Match the module's tensors with the files'; nothing is read."""
        self._component: Component = model.checkpoint.component(name)
        self._convolves = name in model.role("decoder")
        module, pieces = model.matched(name)
        self.shapes = shapes_of(module)
        self._pieces: Mapping[str, Piece] = pieces
        self._dtype = dtype

    def all_planned(self, rows: Iterable[Row], prefix: str = "") -> list[Planned]:
        """Return the tensors that the rows of a key map make, their names behind a prefix."""
        return [one for row in rows for one in self.planned(f"{prefix}{row.source}", row)]

    def planned(self, name: str, row: Row) -> list[Planned]:
        """Return the tensor that a row of a key map makes of the module's, and its scales."""
        dtype = self._dtype_of(row.targets)
        first = self.shapes[row.targets[0]]
        rows = (sum(self.shapes[target][0] for target in row.targets),) if first else ()
        tail = (1, 1) if row.change == "conv_to_linear" else ()
        shape = (*rows, *first[1:], *tail)
        if dtype != "I8":
            return [Planned(name, dtype, shape, lambda: self._make(row, dtype))]
        scale = f"{name.removesuffix('.weight')}.weight_scale"
        return [
            Planned(name, "I8", shape, lambda: _quantised(self._make(row, "F32"))[0]),
            Planned(scale, "F32", (*rows, 1), lambda: _quantised(self._make(row, "F32"))[1]),
        ]

    def _make(self, row: Row, dtype: str) -> torch.Tensor:
        tensors = {}
        for target in row.targets:
            piece = self._pieces[target]
            tensor = self._component.read(piece.source, piece.start, piece.stop)
            # of fp8, torch moves nothing but the bytes
            cast = tensor.to(_TORCH[dtype]) if dtype in _TORCH else tensor.view(torch.uint8)
            tensors[target] = changed(cast, piece.change)
        return joined(row, tensors)

    def _dtype_of(self, targets: Iterable[str]) -> str:
        targets = list(targets)
        if self._dtype == INT8:
            return "I8" if all(self._is_large(target) for target in targets) else "BF16"
        if self._dtype != KEEP:
            return DTYPES[self._dtype]
        entries = [self._component.entries[self._pieces[target].source] for target in targets]
        if odd := next((entry for entry in entries if _is_reduced(entry)), None):
            raise RequestError(
                "a quantised tensor cannot be kept as it is in another layout",
                seen=f"{odd.name}: {odd.dtype}",
                allowed=f"--dtype {', '.join(DTYPES)}",
            )
        if len({entry.dtype for entry in entries}) > 1:
            raise RequestError(
                "tensors that belong together are of several dtypes",
                seen=", ".join(f"{entry.name}: {entry.dtype}" for entry in entries),
                allowed=f"--dtype {', '.join(DTYPES)}",
            )
        return entries[0].dtype

    def _is_large(self, target: str) -> bool:
        """Say whether a tensor is the matrix of a block, that is in a list of layers.

        The autoencoder has convolutions, and few matrices.
        """
        inside = any(part.isdigit() for part in target.split(".")) and not self._convolves
        return inside and target.endswith(".weight") and len(self.shapes[target]) == 2  # noqa: PLR2004


def _quantised(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in int8, its largest number of each row 127, and the rows' scales."""
    scales = matrix.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (matrix / scales).round().to(torch.int8), scales


def _is_reduced(entry: TensorEntry) -> bool:
    return entry.dtype in QUANTISED or entry.scale is not None
