"""What lies where in a scene: a second thing for the transformer to learn from.

The flow's own loss is small where a triangle stands for a square, and says nothing of why. So,
while it learns, a layer that is dropped afterwards tells from the states in the middle of the
transformer, at each image token, which shape of which colour is there (the states are given a
meaning that is known beforehand; after Yu et al.: Representation Alignment for Generation, 2025).
In landscapes it tells where boats are, the smallest things that a sentence asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from danqing.pocket.geometry import COLOURS, SHAPES, SIDE
from training.dataset import scene
from training.painter import boats_about
from training.scenes import SAILS, Geometry

if TYPE_CHECKING:
    from training.scenes import Scene

GRID = 8
"""Image tokens to a side."""
REACH = 6.0
"""Pixels beyond a thing's radius at which a token's middle still counts as part of it."""
UNKNOWN = -1
"""Label of what a kind of scene does not have."""
KINDS = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(SAILS))
"""Values of the labels (shape, colour, boat by its sail); 0 is none of them."""
BOAT = 2
"""Number of the label that tells boats."""
BOAT_WIDTH, BOAT_HEIGHT = 15.0, 16.0
"""Pixels to each side of a boat's middle in which a token's middle counts as part of it."""


def of_scene(what: Scene) -> np.ndarray:
    """Return the numbers of shape, colour and boat at each token, (3, 64), int8."""
    middle = (np.arange(GRID) + 0.5) * SIDE / GRID
    y, x = np.meshgrid(middle, middle, indexing="ij")
    labels = np.full((len(KINDS), GRID, GRID), UNKNOWN, np.int8)
    if isinstance(what, Geometry):
        labels[:BOAT] = 0
        for thing in what.things:
            inside = np.hypot(x - thing.x * SIDE, y - thing.y * SIDE) < thing.radius + REACH
            labels[0][inside] = 1 + list(SHAPES).index(thing.shape)
            labels[1][inside] = 1 + list(COLOURS).index(thing.colour)
    else:
        labels[BOAT] = 0
        for boat_x, boat_y in boats_about(what):
            inside = (np.abs(x - boat_x) < BOAT_WIDTH) & (np.abs(y - boat_y) < BOAT_HEIGHT)
            labels[BOAT][inside] = 1 + SAILS.index(what.sail)
    return labels.reshape(len(KINDS), -1)


def of_scenes(seed: int, count: int) -> torch.Tensor:
    """Return the labels of the first `count` scenes, (count, 3, 64), int8."""
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

    def loss(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge what the last forward pass knew.

        Args:
            labels: (n, 3, 64).

        Returns:
            The cross entropy, things and ground weighing the same; the share of the shapes' tokens
            at which both their labels were right; and the share of the boats' tokens.
        """
        if self._states is None:
            msg = "there was no forward pass"
            raise RuntimeError(msg)
        scores = torch.split(self.teller(self._states.float()), list(KINDS), dim=-1)
        self._states = None
        shape, colour, boat = (
            _judged(score, target)
            for score, target in zip(scores, labels.long().unbind(1), strict=True)
        )
        total = (shape[0] + colour[0] + boat[0]) / 2
        return total, (shape[1] & colour[1]).float().mean(), boat[1].float().mean()


def _judged(scores: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy of one label where it is known, and where things are told right."""
    known, thing = target != UNKNOWN, target > 0
    losses = F.cross_entropy(scores.transpose(1, 2), target.clamp(min=0), reduction="none")
    loss = sum(
        (losses[part].mean() for part in (thing, known & ~thing) if part.any()),
        scores.new_zeros(()),
    )
    return loss / 2, (scores.argmax(-1) == target)[thing]
