"""What of a network is read together: blocks, and layers that are needed once in a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from danqing.networks.loading import changed, place, stays_mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from danqing.devices import Device
    from danqing.networks.loading import Piece
    from danqing.weights import Component
    from danqing.weights.ranges import Span


@dataclass(frozen=True)
class Unit:
    """What is read together: a block, or a layer that is needed once in a run.

    Attributes:
        name: its path in the network.
        tensors: paths of its tensors.
        elements: numbers in them.
        once: it is needed in the first step only.
    """

    name: str
    tensors: tuple[str, ...]
    elements: int
    once: bool = False


def units_of(module: torch.nn.Module, once: Sequence[str] = ()) -> list[Unit]:
    """Return what can be streamed of a network, in the order in which it is needed.

    Blocks are the elements of the outermost lists of layers; what lies outside of them is small.
    Before each are the layers inside it that are needed once; first of all, those outside.

    Args:
        module: the network.
        once: paths of layers that are needed once in a run.
    """
    early: dict[str, list[Unit]] = {}
    for name in once:
        unit = _unit(name, _tensors(module.get_submodule(name), name), once=True)
        early.setdefault(block_of(module, name), []).append(unit)
    taken = {tensor for units in early.values() for unit in units for tensor in unit.tensors}
    found = early.get("", [])
    for name, block in blocks_of(module):
        tensors = _tensors(block, name)
        own = {n: count for n, count in tensors.items() if n not in taken}
        found = [*found, *early.get(name, ()), _unit(name, own)]
    return found


def block_of(module: torch.nn.Module, layer: str) -> str:
    """Return the path of the block that a layer lies in; empty if it lies in none."""
    return next((name for name, _ in blocks_of(module) if layer.startswith(f"{name}.")), "")


def _unit(name: str, tensors: Mapping[str, int], *, once: bool = False) -> Unit:
    return Unit(name, tuple(tensors), sum(tensors.values()), once)


def blocks_of(module: torch.nn.Module, prefix: str = "") -> list[tuple[str, torch.nn.Module]]:
    """Return the elements of the outermost lists of layers, with their paths."""
    found = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, torch.nn.ModuleList):
            found += [(f"{path}.{number}", block) for number, block in enumerate(child)]
        else:
            found += blocks_of(child, f"{path}.")
    return found


def _tensors(module: torch.nn.Module, name: str) -> dict[str, int]:
    return {f"{name}.{path}": tensor.numel() for path, tensor in module.state_dict().items()}


def spans_of(component: Component, pieces: Sequence[Piece]) -> list[Span] | None:
    """Return the bytes of tensors, or None if one of them is no plain range of a file."""
    spans = [component.span(piece.source, piece.start, piece.stop) for piece in pieces]
    known = [span for span in spans if span is not None]
    return known if len(known) == len(spans) else None


@dataclass
class Source:
    """Where the tensors of a network come from and what they become.

    Attributes:
        component: the weights.
        pieces: of each tensor by its path.
        dtype_of: what each is wanted in.
        device: where they are wanted.
    """

    component: Component
    pieces: Mapping[str, Piece]
    dtype_of: Callable[[str], torch.dtype]
    device: Device

    def decode(
        self, tensor: str, data: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Make a tensor, on the device, of its bytes; on the host in `out`, if that is given."""
        piece = self.pieces[tensor]
        dtype = self.dtype_of(tensor)
        into = None if piece.change else out
        rows = (piece.start, piece.stop)
        found = self.component.decode(piece.source, data, rows, dtype, into)
        found = changed(found, piece.change)
        if out is None:
            return place(found, dtype, self.device.torch_device)
        wide = out.view(found.shape)
        return wide if found.data_ptr() == out.data_ptr() else wide.copy_(found)

    def row_scales(self, tensor: str) -> torch.Tensor | None:
        """Return a scale for each row of a tensor that is stored in int8, else None."""
        piece = self.pieces[tensor]
        if piece.change:
            return None
        return self.component.row_scales(piece.source, piece.start, piece.stop)

    def wide_bytes(self, tensor: str) -> int:
        """Return the bytes of a tensor that is made of those read; 0 if it is used as it lies."""
        piece, dtype = self.pieces[tensor], self.dtype_of(tensor)
        if stays_mapped(self.component, piece, dtype, self.device.torch_device):
            return 0
        shape = self.component.entries[piece.source].shape
        return (piece.stop - piece.start) * math.prod(shape[1:]) * dtype.itemsize
