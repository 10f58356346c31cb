"""A linear layer in int8: weights by output channel, activations by token, as they come.

See W8A8 in LLM.int8() (Dettmers et al., https://arxiv.org/abs/2208.07339) for what the scales are.
Activations are unsigned bytes around 128. The product is our own where the processor has
AVX512-VNNI and no AMX: as fast as oneDNN's there, and packing the weights takes a tenth of the
product's time, where oneDNN's packing takes longer than the product (decision 0014); so blocks can
be packed anew each time they are read. Elsewhere it is oneDNN's, which takes one scale for all
activations, so it is given 1, and the rows' own are multiplied in afterwards.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from danqing.devices import native

if TYPE_CHECKING:
    from collections.abc import Callable

_MIDDLE = 128
_PANEL = 64
"""Output channels that the kernel computes together."""


class Int8Linear:
    """One layer; keeps a byte for each weight, in the order that the product wants."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None = None
    ) -> None:
        """Quantise and pack a weight.

        Args:
            weight: (out, in), multiples of 16; of any floating-point dtype, or int8 with `scales`.
            bias: (out,), or None.
            scales: (out,), float32: rows of the weight are to be multiplied by them.
        """
        make = _own if native.has_int8() else _of_onednn
        self._bias = None if bias is None else bias.to(torch.bfloat16, copy=True)
        if scales is None:
            weight = weight.to(torch.bfloat16)
        self._product = make(weight.contiguous(), scales, self._bias)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return (..., out) of (..., in), in the dtype that comes in."""
        rows = states.reshape(-1, states.shape[-1]).to(torch.bfloat16).contiguous()
        whole, scales = native.quantised(rows, signed=False)
        out = self._product(whole, scales)
        return out.reshape(*states.shape[:-1], out.shape[-1]).to(states.dtype)


def _own(
    weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    own = native.loaded()
    outputs, inputs = weight.shape
    packed = torch.empty(-(-outputs // _PANEL) * _PANEL * inputs, dtype=torch.int8)
    pack = own.danqing_int8_pack if scales is None else own.danqing_int8_pack_bytes
    scales = torch.empty(outputs) if scales is None else scales.contiguous()
    offsets = torch.empty(outputs, dtype=torch.int32)
    sizes = [ctypes.c_int64(outputs), ctypes.c_int64(inputs)]
    pack(*map(native.at, (weight, packed, scales, offsets)), *sizes)

    def product(whole: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(whole), outputs, dtype=torch.bfloat16)
        own.danqing_int8_linear(
            *map(native.at, (whole, by, packed, scales, offsets, bias, out)),
            *map(ctypes.c_int64, (len(whole), inputs, outputs)),
        )
        return out

    return product


def _of_onednn(
    weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if scales is None:
        weight, scales = native.quantised(weight, signed=True)
    packed: Any = torch.ops.onednn.qlinear_prepack(weight, None)
    zeros = torch.zeros(len(weight), dtype=torch.int64)

    def product(whole: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, _MIDDLE, packed, scales, zeros, None,
            1.0, 0, torch.bfloat16, "none", [], "",
        )  # fmt: skip
        native.scale_rows(out, by, bias)
        return out

    return product
