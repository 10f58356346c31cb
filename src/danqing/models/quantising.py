"""Arithmetic in int8: the linear layers of a block, computed with bytes where the device can."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from danqing.models.streaming import Recoding

if TYPE_CHECKING:
    from collections.abc import Collection

    from danqing.devices import Device

MULTIPLE = 16
"""Rows and columns of a weight are a multiple of it."""


def in_int8(device: Device, kept: Collection[str]) -> Recoding:
    """Return the form in which blocks are computed in int8.

    Args:
        device: whose arithmetic it is.
        kept: names of the blocks that keep it, and are not read again.
    """
    return Recoding(partial(_to_int8, device), _from_int8, kept)


def _to_int8(device: Device, block: torch.nn.Module) -> set[int]:
    """Let a block's linear layers compute in int8; return the parameters that does not need."""
    gone: set[int] = set()
    for layer in block.modules():
        if type(layer) is not torch.nn.Linear or not layer.weight.numel():
            continue
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            continue
        product = device.int8_linear(layer.weight.data, _data(layer.bias))
        if product is None:
            continue
        vars(layer)["forward"] = product
        gone |= {id(parameter) for parameter in layer.parameters()}
    return gone


def _from_int8(block: torch.nn.Module) -> None:
    """Take the products of bytes away."""
    for layer in block.modules():
        if type(layer) is torch.nn.Linear:
            vars(layer).pop("forward", None)


def _data(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.data
