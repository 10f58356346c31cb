"""What a pocket picture shows, told from its pixels alone: the judge of prompt adherence.

It knows the pigments and the shapes (`danqing.pocket.geometry`) and looks for patches of one
colour; it knows nothing of prompts, seeds or the model. `training/` tests it on the painter's own
pictures, where the truth is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from danqing.pocket.geometry import (
    COLOURS,
    GROUNDS,
    HORIZON,
    LIGHTS,
    RELATIONS,
    SHAPES,
    SIDE,
    SKIES,
    TIMBER,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Pixels = NDArray[np.float32]
    Mask = NDArray[np.bool_]

_LEAST_AREA = 60
_GRID = 24


@dataclass(frozen=True, kw_only=True)
class Found:
    """One patch: what it is and where.

    Attributes:
        shape: the most like it.
        colour: the nearest.
        x: of its middle, as a fraction of the width.
        y: of its middle, as a fraction of the height, from the top.
        area: in pixels.
        likeness: share of its area and the shape's that they have in common, 0 to 1.
    """

    shape: str
    colour: str
    x: float
    y: float
    area: int
    likeness: float


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A geometric scene as a prompt tells it.

    Attributes:
        things: shape and colour of each.
        word: how two things lie (`above`, ...), where one lies (`upper left`, ...), or nothing.
        ground: colour of the ground.
    """

    things: tuple[tuple[str, str], ...]
    word: str
    ground: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a picture shows what was wanted.

    Attributes:
        colour: the ground and every thing have the right colours, and nothing else is there.
        shape: there are the right shapes, and no others.
        relation: every thing has both, and is where it should be; None where nothing was said.
    """

    colour: bool
    shape: bool
    relation: bool | None


# --- geometric scenes ----------------------------------------------------------------------------


def judge(image: Image, wanted: Wanted) -> Verdict:
    """Compare a picture with what was wanted."""
    ground, found = look(image)
    colours = sorted(colour for _, colour in wanted.things)
    shapes = sorted(shape for shape, _ in wanted.things)
    right = sorted((thing.shape, thing.colour) for thing in found) == sorted(wanted.things)
    several = len(wanted.things) > 1
    placed = right and _is_placed(found, wanted)
    return Verdict(
        colour=ground == wanted.ground and sorted(one.colour for one in found) == colours,
        shape=sorted(one.shape for one in found) == shapes,
        relation=placed if wanted.word or several else None,
    )


def _is_placed(found: list[Found], wanted: Wanted) -> bool:
    if wanted.word in RELATIONS:
        across, down = RELATIONS[wanted.word]
        first = next(one for one in found if (one.shape, one.colour) == wanted.things[0])
        second = next(one for one in found if (one.shape, one.colour) == wanted.things[1])
        dx, dy = first.x - second.x, first.y - second.y
        return (dx * across + dy * down) > max(0.15, abs(dx * down) + abs(dy * across))
    return not wanted.word or cell_of(found[0]) == wanted.word


def cell_of(thing: Found) -> str:
    """Return the ninth of the picture a thing is in, by name."""
    row = ("upper", "", "lower")[min(2, int(3 * thing.y))]
    side = ("left", "", "right")[min(2, int(3 * thing.x))]
    if row and side:
        return f"{row} {side}"
    return side or {"upper": "top", "lower": "bottom", "": "middle"}[row]


def look(image: Image) -> tuple[str, list[Found]]:
    """Return the colour of the ground and the things on it, from a picture of any size."""
    pixels = _pixels(image)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    middle = np.median(border, axis=0)
    ground = _nearest(middle, GROUNDS)
    away = np.linalg.norm(pixels - middle, axis=-1)
    found = patches(away > _edge_of(away))
    return ground, [_thing(pixels, patch) for patch in found if patch.sum() >= _LEAST_AREA]


def _edge_of(away: Pixels) -> float:
    """Return how far from the ground's colour a thing begins; less where all is pale."""
    return float(np.clip(0.4 * np.percentile(away, 99.5), 22, 40))


def _thing(pixels: Pixels, patch: Mask) -> Found:
    rows, columns = np.nonzero(patch)
    inner = patch & _shifted(patch)
    colour = np.median(pixels[inner if inner.any() else patch], axis=0)
    shape, likeness = _shape_of(
        patch[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    )
    return Found(
        shape=shape,
        colour=_nearest(colour, COLOURS),
        x=float(columns.min() + columns.max() + 1) / 2 / SIDE,
        y=float(rows.min() + rows.max() + 1) / 2 / SIDE,
        area=int(patch.sum()),
        likeness=likeness,
    )


def _shifted(patch: Mask) -> Mask:
    """Return where all four neighbours belong to the patch."""
    inner = np.zeros_like(patch)
    inner[1:-1, 1:-1] = patch[:-2, 1:-1] & patch[2:, 1:-1] & patch[1:-1, :-2] & patch[1:-1, 2:]
    return inner


def _shape_of(box: Mask) -> tuple[str, float]:
    """Return the shape whose outline, brought to the same box, agrees best."""
    mask = _resized(box)
    shares = {
        name: float((mask & shape).sum() / (mask | shape).sum())
        for name, shape in _outlines().items()
    }
    best = max(shares, key=lambda name: shares[name])
    return best, shares[best]


@cache
def _outlines() -> dict[str, Mask]:
    line = np.arange(-40, 40, dtype=np.float32) + np.float32(0.5)
    x, y = np.meshgrid(line, line)
    found = {}
    for name, distance in SHAPES.items():
        mask = distance(x, y, 28.0) > 0
        rows, columns = np.nonzero(mask)
        found[name] = _resized(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    return found


def _resized(mask: Mask) -> Mask:
    """Return a mask brought to a grid of fixed size, by the nearest pixel."""
    rows = ((np.arange(_GRID) + 0.5) * mask.shape[0] / _GRID).astype(int)
    columns = ((np.arange(_GRID) + 0.5) * mask.shape[1] / _GRID).astype(int)
    found: Mask = mask[rows][:, columns]
    return found


def _nearest(colour: Any, table: dict[str, tuple[int, int, int]]) -> str:
    return min(table, key=lambda name: float(np.linalg.norm(np.asarray(table[name]) - colour)))


def _pixels(image: Image) -> Pixels:
    scaled = image.convert("RGB")
    if scaled.size != (SIDE, SIDE):
        scaled = scaled.resize((SIDE, SIDE))
    return np.asarray(scaled, dtype=np.float32)


def patches(mask: Mask) -> list[Mask]:
    """Return the parts of a mask that hang together by their edges, the largest first."""
    labels = np.zeros(mask.shape, dtype=np.int32)
    parents = [0]

    def root(label: int) -> int:
        while parents[label] != label:
            label = parents[label]
        return label

    for row in range(mask.shape[0]):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[row].astype(np.int8), [0]])))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            above = set(labels[row - 1, start:end].tolist()) - {0} if row else set()
            roots = sorted({root(label) for label in above})
            if not roots:
                parents.append(len(parents))
                roots = [len(parents) - 1]
            for other in roots[1:]:
                parents[other] = roots[0]
            labels[row, start:end] = roots[0]
    names = np.asarray([root(label) for label in range(len(parents))])
    labels = names[labels]
    found: list[Mask] = [labels == label for label in np.unique(labels) if label]
    return sorted(found, key=lambda patch: -int(patch.sum()))


# --- landscapes ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class View:
    """What a landscape shows, as far as a program can tell.

    Attributes:
        time: `day`, `dusk` or `night`.
        body_colour: colour of the sun or moon; empty if there is none.
        mountains: how many.
        boats: how many.
    """

    time: str
    body_colour: str
    mountains: int
    boats: int


def view(image: Image) -> View:
    """Return what a landscape shows."""
    pixels = _pixels(image)
    top = np.median(pixels[:5].reshape(-1, 3), axis=0)
    time = min(SKIES, key=lambda name: float(np.linalg.norm(np.asarray(SKIES[name][0]) - top)))
    colour, body = _body(pixels)
    return View(
        time=time,
        body_colour=colour,
        mountains=_count_peaks(_skyline(pixels, time, body)),
        boats=_count_hulls(pixels),
    )


_SKY_ROWS = 38


def _body(pixels: Pixels) -> tuple[str, Mask | None]:
    """Return colour and patch of the round light in the upper part, if there is one."""
    best: tuple[int, str, Mask | None] = (0, "", None)
    sky = pixels[:_SKY_ROWS]
    distances = {
        name: np.linalg.norm(sky - np.asarray(rgb), axis=-1) for name, rgb in LIGHTS.items()
    }
    for name, distance in distances.items():
        for patch in patches(distance < 42)[:1]:
            rows, columns = np.nonzero(patch)
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            round_enough = 0.6 < height / width < 1.67 and patch.sum() > 0.62 * height * width
            if round_enough and 12 <= width <= 32 and patch.sum() > best[0]:
                best = (int(patch.sum()), name, patch)
    return best[1], best[2]


def _skyline(pixels: Pixels, time: str, body: Mask | None) -> NDArray[np.int_]:
    """Return for each column the first row, from 28 down, that is not sky."""
    top, low = (np.asarray(rgb, dtype=np.float32) for rgb in SKIES[time])
    fall = np.clip((np.arange(SIDE) + 0.5) / HORIZON, 0, 1)[:, None, None]
    solid = np.linalg.norm(pixels - (top + (low - top) * fall), axis=-1) > _SOLID[time]
    if body is not None:
        rows, columns = np.nonzero(body)
        y, x = np.mgrid[0:SIDE, 0:SIDE]
        reach = np.ptp(columns) / 2 + _HALO[time]
        solid &= np.hypot(y - rows.mean(), x - columns.mean()) > reach
    solid[:28] = False
    deep = solid[:-3] & solid[1:-2] & solid[2:-1] & solid[3:]
    return _without_needles(np.where(deep.any(axis=0), deep.argmax(axis=0), SIDE))


def _without_needles(line: NDArray[np.int_]) -> NDArray[np.int_]:
    """Cut off what is narrower than five columns: no mountain is, but the rim of a moon's halo."""
    for keep in (np.max, np.min):
        padded = np.pad(line, _NEEDLE // 2, mode="edge")
        line = keep(np.lib.stride_tricks.sliding_window_view(padded, _NEEDLE), axis=1)
    return line


_SOLID = {"day": 36.0, "dusk": 60.0, "night": 30.0}
"""How far a colour is from the sky's to be something else; mist at dusk is as light as the sky."""
_HALO = {"day": 8, "dusk": 8, "night": 14}
"""Pixels around the sun or moon that are left out."""
_NEEDLE = 5
_TREES_REACH = 53
_RUN = 8


def _count_peaks(skyline: NDArray[np.int_]) -> int:
    """Count the tips of a line that rise at least 5 pixels above the valleys beside them."""
    kernel = np.ones(3) / 3
    line = np.convolve(np.pad(skyline.astype(float), 1, mode="edge"), kernel, mode="valid")
    count, tip, valley, rising = 0, float(SIDE), float(SIDE), True
    for height in [*line, float(SIDE)]:
        if rising:
            tip = min(tip, height)
            if height > tip + 5:
                count += tip < _TREES_REACH
                rising, valley = False, height
        else:
            valley = max(valley, height)
            if height < valley - 5:
                rising, tip = True, height
    return int(count)


def _count_hulls(pixels: Pixels) -> int:
    """Count the wide and flat patches of timber on the water."""
    timber = np.linalg.norm(pixels - np.asarray(TIMBER), axis=-1) < 34
    timber[: int(HORIZON) + 4] = False
    wide = np.zeros_like(timber)  # masts and trunks are narrow: only runs of pixels are kept
    for offset in range(_RUN):
        run = np.all([np.roll(timber, offset - step, axis=1) for step in range(_RUN)], axis=0)
        wide |= run
    count = 0
    for patch in patches(wide):
        rows, columns = np.nonzero(patch)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        inside = columns.min() > 1 and columns.max() < SIDE - 2  # the bank begins at the edge
        count += inside and 12 <= width <= 32 and 2 <= height <= 7
    return int(count)
