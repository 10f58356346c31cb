"""Arithmetic in int8: the linear layers of a block, computed with bytes where the device can."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from danqing.devices import Device

MULTIPLE = 16
"""Rows and columns of a weight are a multiple of it."""


def to_int8(device: Device, block: torch.nn.Module) -> set[int]:
    """Let a block's linear layers compute in int8.

    Args:
        device: whose arithmetic it is.
        block: with its weights in their places.

    Returns:
        The ids of the parameters that are not needed any more.
    """
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


def _data(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.data
