"""Rotary positions made once, on the CPU in float64, for every device and every step.

diffusers makes them in every step on the device, in float64 where it has it and in float32 on NPUs
and on Apple's GPUs: the same picture then differs by device even where all kernels are exact. The
tables are small (4608 x 128 numbers at 1024x1024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    import torch


class Positions(nn.Module):
    """Takes the place of a transformer's own `pos_embed`, and computes with it."""

    def __init__(self, inner: nn.Module) -> None:
        """Keep what computes the tables."""
        super().__init__()
        self.inner = inner
        self._made: tuple[torch.Tensor, ...] | None = None

    def prepare(self, ids: torch.Tensor, device: torch.device) -> None:
        """Make the tables of a run.

        Args:
            ids: (tokens, 3), on the CPU.
            device: where they are used.
        """
        self._made = tuple(table.to(device) for table in self.inner(ids))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return cosines and sines, (tokens, head width) each, float32.

        Raises:
            RuntimeError: they were made for another number of tokens.
        """
        if self._made is None or len(self._made[0]) != len(ids):
            msg = f"positions were not prepared for {len(ids)} tokens"
            raise RuntimeError(msg)
        return self._made
