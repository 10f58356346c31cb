"""Arithmetic in int8: the linear layers of a block, computed with bytes where the device can."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from danqing.networks.streaming import Recoding

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from danqing.devices import Device

MULTIPLE = 16
"""Rows and columns of a weight are a multiple of it."""


def in_int8(device: Device, kept: Collection[str]) -> Recoding:
    """Return the form in which blocks are computed in int8.

    Args:
        device: whose arithmetic it is.
        kept: names of the blocks that keep it, and are not read again.
    """
    return Recoding(_computes_in_int8, partial(_to_int8, device), _from_int8, kept)


def _computes_in_int8(layer: torch.nn.Module) -> bool:
    """Say whether a layer is one that the product of bytes is for."""
    if type(layer) is not torch.nn.Linear:
        return False
    return not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)


def _to_int8(
    device: Device, block: torch.nn.Module, scales: Mapping[int, torch.Tensor]
) -> set[int]:
    """Let a block's linear layers compute in int8; return the parameters that does not need.

    Args:
        device: whose arithmetic it is.
        block: with its weights, some of which may be in int8 already.
        scales: of the rows of these, by the weight's id.
    """
    gone: set[int] = set()
    for layer in block.modules():
        if not isinstance(layer, torch.nn.Linear) or not _computes_in_int8(layer):
            continue
        if not layer.weight.numel():
            continue
        rows = scales.get(id(layer.weight))
        product = device.int8_linear(layer.weight.data, _data(layer.bias), rows)
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
