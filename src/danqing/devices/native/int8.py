"""A linear layer in int8: weights by output channel, activations by token, as they come.

The product is oneDNN's, of unsigned by signed bytes; it takes one scale for all activations, so it
is given 1, and the rows' own are multiplied in afterwards. See W8A8 in LLM.int8() (Dettmers et al.,
https://arxiv.org/abs/2208.07339) for what the scales are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from danqing.devices.native import quantised, scale_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

_MIDDLE = 128


class Int8Linear:
    """One layer; keeps a byte for each weight, in the order that oneDNN wants."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Quantise and pack a weight.

        Args:
            weight: (out, in), of any floating-point dtype.
            bias: (out,), or None.
        """
        whole, self._scales = quantised(weight.to(torch.bfloat16), signed=True)
        self._packed: Any = torch.ops.onednn.qlinear_prepack(whole, None)
        self._zeros = torch.zeros(len(whole), dtype=torch.int64)
        self._bias = None if bias is None else bias.to(torch.bfloat16, copy=True)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return (..., out) of (..., in), in the dtype that comes in."""
        rows = states.reshape(-1, states.shape[-1]).to(torch.bfloat16).contiguous()
        whole, scales = quantised(rows, signed=False)
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, _MIDDLE, self._packed, self._scales, self._zeros, None,
            1.0, 0, torch.bfloat16, "none", [], "",
        )  # fmt: skip
        scale_rows(out, scales, self._bias)
        return out.reshape(_shape(states, out)).to(states.dtype)


def _shape(states: torch.Tensor, out: torch.Tensor) -> Sequence[int]:
    return (*states.shape[:-1], out.shape[-1])
