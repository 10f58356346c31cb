"""What lies where in a geometric scene: a second thing for the transformer to learn from.

The flow's own loss is small where a triangle stands for a square, and says nothing of why. So,
while it learns, a layer that is dropped afterwards tells from the states in the middle of the
transformer, at each image token, which shape of which colour is there (the states are given a
meaning that is known beforehand; after Yu et al.: Representation Alignment for Generation, 2025).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from danqing.pocket.geometry import COLOURS, SHAPES, SIDE
from training.dataset import scene
from training.scenes import Geometry

if TYPE_CHECKING:
    from training.scenes import Scene

GRID = 8
"""Image tokens to a side."""
REACH = 6.0
"""Pixels beyond a thing's radius at which a token's middle still counts as part of it."""
UNKNOWN = -1
"""Label in landscapes, of which nothing is told."""
KINDS = (1 + len(SHAPES), 1 + len(COLOURS))
"""Values of the two labels; 0 is the ground."""


def of_scene(what: Scene) -> np.ndarray:
    """Return the numbers of shape and colour at each token, (2, 64), int8."""
    if not isinstance(what, Geometry):
        return np.full((2, GRID * GRID), UNKNOWN, np.int8)
    middle = (np.arange(GRID) + 0.5) * SIDE / GRID
    y, x = np.meshgrid(middle, middle, indexing="ij")
    labels = np.zeros((2, GRID, GRID), np.int8)
    for thing in what.things:
        inside = np.hypot(x - thing.x * SIDE, y - thing.y * SIDE) < thing.radius + REACH
        labels[0][inside] = 1 + list(SHAPES).index(thing.shape)
        labels[1][inside] = 1 + list(COLOURS).index(thing.colour)
    return labels.reshape(2, -1)


def of_scenes(seed: int, count: int) -> torch.Tensor:
    """Return the labels of the first `count` scenes, (count, 2, 64), int8."""
    return torch.from_numpy(np.stack([of_scene(scene(seed, index)[0]) for index in range(count)]))


class Learner(nn.Module):
    """The transformer with the layer that tells the labels.

    Attributes:
        transformer: what is kept.
        teller: image states to the scores of all labels; dropped when the training ends.
    """

    def __init__(self, transformer: Any, *, after: int) -> None:
        """Listen to the image states behind single block number `after`."""
        super().__init__()
        self.transformer = transformer
        self.teller = nn.Linear(transformer.inner_dim, sum(KINDS))
        self._states: torch.Tensor | None = None
        transformer.single_transformer_blocks[after].register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._states = output[1]

    def loss(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge what the last forward pass knew.

        Args:
            labels: (n, 2, 64).

        Returns:
            The cross entropy, things and ground weighing the same, and the share of the things'
            tokens at which both labels were right.
        """
        if self._states is None:
            msg = "there was no forward pass"
            raise RuntimeError(msg)
        told = (labels[:, 0] != UNKNOWN).any(dim=1)
        scores = self.teller(self._states[told].float())
        target = labels[told].long()
        thing = target[:, 0] > 0
        total, right = scores.new_zeros(()), torch.ones_like(thing)
        for number, part in enumerate(torch.split(scores, list(KINDS), dim=-1)):
            losses = F.cross_entropy(part.transpose(1, 2), target[:, number], reduction="none")
            total = total + (losses[thing].mean() + losses[~thing].mean()) / 4
            right = right & (part.argmax(-1) == target[:, number])
        self._states = None
        return total, right[thing].float().mean()
