"""What flow models share: their starting noise and the shift of their schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def draw(seed: int, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Draw everything random of one picture, in order; the first is its noise.

    On the CPU and in float32 always, so that a seed means the same numbers on every device and in
    every dtype. What is drawn later does not change what was drawn before.

    Args:
        seed: of PyTorch's CPU generator.
        shapes: of the tensors.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]


def resolution_shift(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Return mu, the shift of the schedule for pictures of this many tokens.

    The line through (256 tokens, 0.5) and (4096 tokens, 1.15), not bounded beyond them.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return tokens * slope + (base_shift - slope * base_tokens)
