"""The colours and shapes the pocket model knows; what the painter paints and the judge looks for.

Shapes are signed distances: positive inside, in the unit of the coordinates given, so that a
picture of any size is drawn with smooth edges by clipping them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

Array: TypeAlias = NDArray[Any]

COLOURS = {
    "red": (200, 48, 40),
    "orange": (232, 128, 36),
    "yellow": (242, 206, 58),
    "green": (44, 140, 88),
    "blue": (38, 84, 172),
    "purple": (122, 58, 152),
    "black": (28, 26, 30),
    "white": (248, 246, 240),
}
"""Cinnabar, realgar, orpiment, malachite, azurite, lac, ink and shell white, in sRGB."""

GROUNDS = {
    "white": (248, 246, 240),
    "cream": (234, 218, 180),
    "pink": (238, 186, 186),
    "grey": (158, 158, 156),
    "black": (28, 26, 30),
}
"""Colours of the paper under geometric scenes, in sRGB."""


def circle(x: Array, y: Array, r: float) -> Array:
    """Return the signed distance of a disc of radius r around 0, 0."""
    return r - np.hypot(x, y)


def square(x: Array, y: Array, r: float) -> Array:
    """Return the signed distance of an upright square about as large as the disc."""
    return 0.87 * r - np.maximum(np.abs(x), np.abs(y))


def triangle(x: Array, y: Array, r: float) -> Array:
    """Return the signed distance of an equilateral triangle, tip up; y points down."""
    r, y = 1.15 * r, y - 0.15 * r
    slope = np.float32(0.8660254) * np.abs(x) - 0.5 * y
    inside: Array = np.minimum(0.5 * r - slope, 0.5 * r - y)
    return inside


def star(x: Array, y: Array, r: float) -> Array:
    """Return the signed distance of a five-pointed star, one tip up."""
    r = 1.2 * r
    angle = np.arctan2(x, -y)
    sector = np.float32(2 * np.pi / 5)
    folded = np.abs(angle - sector * np.round(angle / sector))
    radius = np.hypot(x, y)
    px, py = radius * np.cos(folded), radius * np.sin(folded)
    # the edge from the tip (r, 0) to the notch between two tips
    notch = 0.42 * r
    nx, ny = notch * np.cos(np.pi / 5), notch * np.sin(np.pi / 5)
    length = float(np.hypot(nx - r, ny))
    inside: Array = ((nx - r) * py - ny * (px - r)) / length
    return inside


def ring(x: Array, y: Array, r: float) -> Array:
    """Return the signed distance of a ring."""
    return 0.24 * r - np.abs(np.hypot(x, y) - 0.8 * r)


def cross(x: Array, y: Array, r: float) -> Array:
    """Return the signed distance of an upright cross with arms of equal length."""
    ax, ay = np.abs(x), np.abs(y)
    return np.maximum(
        np.minimum(1.02 * r - ax, 0.34 * r - ay), np.minimum(0.34 * r - ax, 1.02 * r - ay)
    )


SHAPES: dict[str, Callable[[Array, Array, float], Array]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "ring": ring,
    "cross": cross,
}

CELLS = {
    "upper left": (0.24, 0.24),
    "upper right": (0.76, 0.24),
    "lower left": (0.24, 0.76),
    "lower right": (0.76, 0.76),
    "top": (0.5, 0.22),
    "bottom": (0.5, 0.78),
    "left": (0.22, 0.5),
    "right": (0.78, 0.5),
    "middle": (0.5, 0.5),
}
"""Where one thing can be: x and y, as fractions of the width and the height from the upper left."""

RELATIONS = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}
"""Where the first of two things is, seen from the second: x and y, y down."""

SIDE = 128
"""Pixels; the size at which the model paints."""
HORIZON = 84.0
"""Where the water of a landscape begins, in pixels from the top."""
SKIES = {
    "day": ((226, 212, 176), (244, 234, 208)),
    "dusk": ((206, 128, 96), (246, 206, 140)),
    "night": ((18, 26, 58), (62, 78, 118)),
}
"""The silk by the time of day: its colour at the top and at the horizon."""
LIGHTS = {
    "red": (206, 44, 34),
    "golden": (246, 196, 70),
    "orange": (236, 120, 36),
    "white": (250, 248, 238),
}
"""Colours of sun and moon."""
TIMBER = (74, 46, 30)
"""Colour of a boat's hull."""
