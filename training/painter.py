"""From scenes to pixels: mineral pigments and ink on silk, and flat shapes on paper.

Everything is drawn at its final size with analytic edges (a coverage between 0 and 1 from a signed
distance), so nothing needs to be supersampled. Coordinates are pixels of a 128 x 128 picture.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from danqing.pocket.geometry import (
    COLOURS,
    GROUNDS,
    HORIZON,
    LIGHTS,
    SHAPES,
    SIDE,
    SKIES,
    TIMBER,
    Array,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.scenes import Geometry, Landscape, Scene

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + np.float32(0.5)
_LINE = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)

PIGMENT = {
    "blue": (30, 82, 158),
    "green": (40, 128, 92),
    "grey": (88, 92, 96),
    "purple": (112, 66, 138),
    "red": (178, 58, 44),
    "golden": (206, 150, 44),
}
SAIL = {"white": (250, 246, 236), "red": (196, 48, 40), "brown": (150, 96, 52)}
INK = (36, 32, 34)
WATER = {"day": (150, 190, 186), "dusk": (186, 140, 124), "night": (30, 48, 92)}
LEAVES = {
    "pine": (32, 82, 60),
    "willow": (120, 160, 70),
    "blossom": (238, 160, 178),
    "maple": (204, 72, 38),
    "bare": INK,
}


def paint(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """Return the scene as (128, 128, 3) bytes of sRGB; equal generators give equal pictures."""
    from training.scenes import Landscape

    canvas = _landscape(scene, random) if isinstance(scene, Landscape) else _geometry(scene, random)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _colour(rgb: Sequence[float]) -> Array:
    colour: Array = np.asarray(rgb, dtype=np.float32) / np.float32(255)
    return colour


def _lay(canvas: Array, rgb: Sequence[float] | Array, cover: Array) -> None:
    """Lay a colour over the canvas; the cover is (128, 128), 0 to 1."""
    colour = rgb if isinstance(rgb, np.ndarray) else _colour(rgb)
    canvas += (colour - canvas) * cover[..., None]


def _edge(distance: Array) -> Array:
    """Return the cover of a signed distance, positive inside, with an edge one pixel wide."""
    cover: Array = np.clip(distance + np.float32(0.5), 0, 1)
    return cover


# --- geometric scenes ----------------------------------------------------------------------------


def _geometry(scene: Geometry, random: np.random.Generator) -> Array:
    ground = _colour(GROUNDS[scene.ground]) + random.normal(0, 0.008)
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = ground
    for thing in scene.things:
        distance = SHAPES[thing.shape](_X - thing.x * SIDE, _Y - thing.y * SIDE, thing.radius)
        _lay(canvas, _colour(COLOURS[thing.colour]) + random.normal(0, 0.012), _edge(distance))
    return canvas


# --- landscapes ----------------------------------------------------------------------------------


def _landscape(scene: Landscape, random: np.random.Generator) -> Array:
    canvas = _sky(scene)
    _body(canvas, scene, random)
    horizon = HORIZON if scene.water else 106.0
    _far_hills(canvas, scene, random, horizon)
    _mountains(canvas, scene, random, horizon)
    if scene.mist:
        _mist(canvas, scene, random, horizon)
    if scene.water:
        _water(canvas, scene, random)
    else:
        _plain(canvas, scene, random)
    _birds(canvas, scene, random)
    _boats(canvas, scene, random)
    _bank(canvas, scene, random)
    return canvas


def _sky(scene: Landscape) -> Array:
    top, low = (_colour(rgb) for rgb in SKIES[scene.time])
    fall = np.clip(_LINE / HORIZON, 0, 1)[:, None, None]
    sky: Array = (top + (low - top) * fall) * np.ones((1, SIDE, 1), np.float32)
    return sky


_BODY_X = {"left": 26.0, "middle": 64.0, "right": 102.0}


def _body(canvas: Array, scene: Landscape, random: np.random.Generator) -> None:
    if not scene.body:
        return
    x = _BODY_X[scene.body_place] + random.uniform(-5, 5)
    y, radius = random.uniform(19, 24), random.uniform(9.5, 12.5)
    away = np.hypot(_X - x, _Y - y)
    halo = 0.28 * np.exp(-np.square(np.maximum(away - radius, 0) / 9))
    _lay(canvas, LIGHTS[scene.body_colour], halo)
    _lay(canvas, LIGHTS[scene.body_colour], _edge(radius - away))


def _far_hills(canvas: Array, scene: Landscape, random: np.random.Generator, floor: float) -> None:
    """Lay two faint ridges far away, in the tone of the sky."""
    tone = _colour(SKIES[scene.time][0]) * 0.82 + _colour(PIGMENT["grey"]) * 0.18
    for height, strength in ((20, 0.25), (12, 0.4)):
        ridge = floor - height - _waves(random, 7, (60, 31, 17))
        _lay(canvas, tone, strength * _edge(_Y - ridge))


def _waves(random: np.random.Generator, size: float, lengths: Sequence[float]) -> Array:
    """Return a smooth random line: sines of the given wave lengths, the long ones larger."""
    line = np.zeros(SIDE, np.float32)
    for length in lengths:
        phase = random.uniform(0, 2 * np.pi)
        line += np.sin(_LINE * np.float32(2 * np.pi / length) + np.float32(phase)) * np.float32(
            size * length / lengths[0]
        )
    return line


def _mountains(canvas: Array, scene: Landscape, random: np.random.Generator, floor: float) -> None:
    """Paint the mountains, the higher ones first."""
    count = scene.mountains
    if not count:
        return
    room = 104 / count
    xs = [12 + room * (index + 0.5) + random.uniform(-0.08, 0.08) * room for index in range(count)]
    # neighbours are of different heights, yet each tip is clear of the others' slopes
    first_high = random.random() < 0.5
    tops = [
        random.uniform(35, 39) if (index % 2 == 0) == first_high else random.uniform(44, 48)
        for index in range(count)
    ]
    if count == 1:
        tops = [random.uniform(32, 38)]
    half = {1: 50.0, 2: 36.0, 3: 25.0, 4: 18.5}[count]
    order = sorted(range(count), key=lambda index: tops[index])
    for index in order:
        width = half * random.uniform(0.95, 1.08)
        _mountain(canvas, scene, random, x=xs[index], top=tops[index], width=width, floor=floor)


def _mountain(
    canvas: Array,
    scene: Landscape,
    random: np.random.Generator,
    *,
    x: float,
    top: float,
    width: float,
    floor: float,
) -> None:
    away = np.abs(_LINE - np.float32(x)) / np.float32(width)
    profile = np.exp(-np.power(away, np.float32(1.5)) * np.float32(1.25))
    rough = _waves(random, 1.6, (23, 11, 6)) * (np.float32(0.35) + np.minimum(away, 1))
    ridge = np.float32(floor + 3) - np.float32(floor + 3 - top) * profile + rough * (profile > 0.03)
    depth = _Y - ridge
    inside = _edge(depth)
    tall = np.float32(floor - top)
    strength = np.clip(1.0 - 0.78 * np.clip((_Y - np.float32(top)) / tall, 0, 1), 0.16, 1)
    pigment = _colour(PIGMENT[scene.mountain_colour])
    base = _colour(SKIES[scene.time][1]) * 0.7 + _colour((176, 150, 104)) * 0.3
    if scene.time == "night":
        pigment, base = pigment * 0.8 + 0.06, _colour((72, 88, 120))
    strokes = 0.10 * np.sin((_X - x) * 0.55 + _waves(random, 1.2, (41, 19))[:, None] + depth * 0.16)
    body = base + (pigment - base) * np.clip(strength + strokes * strength, 0, 1)[..., None]
    _lay(canvas, body, inside)
    if scene.season == "winter":
        snow = _edge(13 + 2.2 * np.sin((_X - x) * 0.8) - (_Y - top)) * inside
        _lay(canvas, (246, 247, 248) if scene.time != "night" else (196, 208, 226), snow * 0.94)
    outline = inside * np.clip(1.6 - depth, 0, 1)
    _lay(canvas, pigment * 0.45, outline * 0.7)


def _mist(canvas: Array, scene: Landscape, random: np.random.Generator, floor: float) -> None:
    light = _colour(SKIES[scene.time][1]) * 0.5 + 0.5
    if scene.time == "night":
        light = _colour((138, 150, 178))
    for middle, thickness in ((floor - 9, 6.5), (floor - 25, 4.0)):
        line = middle + _waves(random, 2.5, (90, 37))
        _lay(canvas, light, 0.82 * np.exp(-np.square((_Y - line) / thickness)))


def _water(canvas: Array, scene: Landscape, random: np.random.Generator) -> None:
    colour = _colour(WATER[scene.time])
    deeper = np.clip((_Y - HORIZON) / (SIDE - HORIZON), 0, 1)[..., None]
    water = colour + (colour * 0.72 - colour) * deeper
    shore = HORIZON + _waves(random, 0.8, (70, 29))
    _lay(canvas, water, _edge(_Y - shore))
    phase = random.uniform(0, 6.28)
    near = np.square((_Y - HORIZON) / (SIDE - HORIZON))
    lines = np.sin((_Y - HORIZON) * 1.15 + np.sin(_X * 0.13 + phase) * 1.3 + phase)
    glint = np.clip(lines - 0.72, 0, 1) * (0.25 + 0.75 * near) * (shore + 2 < _Y)
    _lay(canvas, colour * 0.55 + 0.45, glint * 1.3)
    _lay(canvas, colour * 0.6, 0.5 * np.clip(1.2 - np.abs(_Y - shore), 0, 1))


def _plain(canvas: Array, scene: Landscape, random: np.random.Generator) -> None:
    ground = {
        "spring": (150, 172, 96),
        "summer": (112, 152, 84),
        "autumn": (196, 150, 84),
        "winter": (236, 238, 238),
    }[scene.season]
    dim = {"day": 1.0, "dusk": 0.82, "night": 0.42}[scene.time]
    for start, shade in ((100.0, 1.0), (112.0, 0.88)):
        line = start + _waves(random, 2.6, (80, 33))
        _lay(canvas, _colour(ground) * dim * shade, _edge(_Y - line))


def _stroke(
    canvas: Array, rgb: Sequence[float], points: Sequence[tuple[float, float]], width: float
) -> None:
    """Draw a line through points, `width` pixels wide."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        left, right = int(min(x0, x1) - width - 1), int(max(x0, x1) + width + 2)
        upper, lower = int(min(y0, y1) - width - 1), int(max(y0, y1) + width + 2)
        window = np.s_[max(upper, 0) : max(lower, 0), max(left, 0) : max(right, 0)]
        x, y = _X[window], _Y[window]
        if not x.size:
            continue
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
        distance = width / 2 - np.hypot(x - x0 - along * dx, y - y0 - along * dy)
        _lay(canvas[window], rgb, _edge(distance))


def _birds(canvas: Array, scene: Landscape, random: np.random.Generator) -> None:
    if not scene.birds:
        return
    taken = _BODY_X[scene.body_place] if scene.body else -99.0
    while True:
        x = random.uniform(26, 102)
        if abs(x - taken) > 27:
            break
    y = random.uniform(14, 22)
    ink = INK if scene.time != "night" else (206, 212, 226)
    places = [(0.0, 0.0), (-11.0, 5.0), (11.0, 6.0), (-4.0, 10.0), (7.0, -6.0)]
    for dx, dy in places[: scene.birds]:
        cx = x + dx + random.uniform(-1, 1)
        cy = y + dy + random.uniform(-1, 1)
        span = random.uniform(4.2, 5.0)
        wings = [(cx - span, cy - 2.4), (cx - span / 2, cy - 2.6), (cx, cy + 0.6)]
        mirrored = [(2 * cx - wx, wy) for wx, wy in wings]
        _stroke(canvas, ink, wings, 1.5)
        _stroke(canvas, ink, mirrored, 1.5)


_BOAT_X = {"left": 34.0, "middle": 64.0, "right": 94.0}
_BOATS = {2: ((38, 98.0), (88, 108.0)), 3: ((28, 97.0), (64, 109.0), (100, 98.0))}


def boats_about(scene: Landscape) -> tuple[tuple[float, float], ...]:
    """Return the middles of the boats and their sails, to a few pixels: (x, y) of each."""
    if scene.boats == 1:
        return ((_BOAT_X[scene.boat_place], 96.0),)
    return tuple((x, y - 7) for x, y in _BOATS.get(scene.boats, ()))


def _boats(canvas: Array, scene: Landscape, random: np.random.Generator) -> None:
    if scene.boats == 1:
        _boat(
            canvas,
            scene,
            _BOAT_X[scene.boat_place] + random.uniform(-5, 5),
            random.uniform(99, 108),
            random.uniform(0.95, 1.12),
        )
        return
    for x, y in _BOATS.get(scene.boats, ()):
        _boat(
            canvas,
            scene,
            x + random.uniform(-4, 4),
            y + random.uniform(-2, 2),
            random.uniform(0.8, 0.9),
        )


def _boat(canvas: Array, scene: Landscape, x: float, y: float, size: float) -> None:
    u, v = (_X - np.float32(x)) / size, (_Y - np.float32(y)) / size
    shadow = np.exp(-np.square(u / 12) - np.square((v - 4.2) / 1.6))
    _lay(canvas, _colour(WATER[scene.time]) * 0.45, 0.6 * shadow)
    hull = np.minimum(3.6 - v, v + 0.5 - 0.016 * u * u)
    hull = np.minimum(hull, 13.5 - np.abs(u) - 0.9 * v)
    _lay(canvas, TIMBER, _edge(hull * size))
    mast = np.minimum(0.55 - np.abs(u + 0.5), np.minimum(-v + 1, v + 19))
    _lay(canvas, INK, _edge(mast * size))
    bulge = 8.2 - 0.03 * np.square(v + 9)
    sail = np.minimum(np.minimum(u + 0.2, bulge - u + 0.18 * (v + 9)), np.minimum(-v - 1.5, v + 18))
    dim = {"day": 1.0, "dusk": 0.95, "night": 0.86}[scene.time]
    _lay(canvas, _colour(SAIL[scene.sail]) * dim, _edge(sail * size))


def _bank(canvas: Array, scene: Landscape, random: np.random.Generator) -> None:
    """Paint the bank in front, in a lower corner, with what stands on it."""
    if not scene.bank:
        return
    side = -1.0 if scene.bank == "right" else 1.0
    edge = 0.0 if scene.bank == "left" else float(SIDE)
    reach = random.uniform(50, 58)
    inward = (_LINE - edge) * side  # 0 at the picture's edge
    ridge = 107 + 21 * np.square(np.clip(inward / reach, 0, 3)) + _waves(random, 0.9, (31, 13))
    dim = {"day": 1.0, "dusk": 0.85, "night": 0.6}[scene.time]
    earth = (232, 234, 236) if scene.season == "winter" else (122, 112, 66)
    depth = _Y - ridge
    _lay(canvas, _colour(earth) * dim, _edge(depth))
    _lay(canvas, _colour(INK), 0.6 * _edge(depth) * np.clip(1.5 - depth, 0, 1))
    if scene.pavilion:
        place = 31.0 if scene.trees else 20.0
        _pavilion(canvas, edge + side * (place + random.uniform(-2, 2)), 109.5, dim)
    if scene.trees:
        x = edge + side * random.uniform(11, 15)
        _tree(canvas, scene, random, x=x, side=side, dim=dim)


def _pavilion(canvas: Array, x: float, y: float, dim: float) -> None:
    u, v = _X - np.float32(x), _Y - np.float32(y)
    for offset in (-6.5, 0.0, 6.5):
        post = np.minimum(0.9 - np.abs(u - offset), np.minimum(-v + 2, v + 13))
        _lay(canvas, _colour((176, 48, 40)) * dim, _edge(post))
    floor = np.minimum(10 - np.abs(u), 1.4 - np.abs(v - 1))
    _lay(canvas, _colour((150, 128, 96)) * dim, _edge(floor))
    # a roof that lifts its corners
    lift = 0.022 * u * u
    roof = np.minimum(
        12.5 - np.abs(u), np.minimum(-12 - lift - v, v + 23 - 0.95 * np.abs(u) + lift)
    )
    _lay(canvas, _colour((40, 64, 70)) * dim, _edge(roof))
    _lay(canvas, _colour((206, 164, 60)) * dim, _edge(1.5 - np.hypot(u, v + 23)))


def _tree(
    canvas: Array,
    scene: Landscape,
    random: np.random.Generator,
    *,
    x: float,
    side: float,
    dim: float,
) -> None:
    y = 109.0
    bend = side * random.uniform(4, 8)
    crown = y - random.uniform(33, 39)
    trunk = [(x, y + 2), (x + bend * 0.2, y - 12), (x + bend * 0.5, y - 24), (x + bend, crown + 3)]
    bark = tuple(float(c) for c in np.asarray((72, 50, 38)) * dim)
    for part, width in zip(range(3), (3.6, 2.8, 2.0), strict=True):
        _stroke(canvas, bark, trunk[part : part + 2], width)
    leaf = _colour(LEAVES[scene.trees]) * dim
    if scene.trees == "bare":
        for px, py in trunk[1:]:
            for way in (-1, 1):
                length = random.uniform(6, 10)
                tip = (px + way * length, py - length * 0.7)
                _stroke(canvas, tuple(float(c) for c in leaf * 255), [(px, py), tip], 1.3)
        return
    blobs = {
        "pine": [(-9, 12, 9.5, 3.4), (8, 8, 9.5, 3.4), (-4, 2, 9.0, 3.4), (4, -4, 7.0, 3.0)],
        "willow": [(-9, 8, 4.2, 11.0), (-2, 3, 5.0, 9.0), (6, 5, 4.6, 11.0), (12, 10, 3.6, 9.5)],
        "blossom": [(-9, 5, 6.5, 5.5), (1, -1, 8.0, 6.5), (10, 6, 6.0, 5.0), (0, 9, 6.0, 4.0)],
        "maple": [(-9, 6, 7.0, 6.0), (1, 0, 9.0, 7.5), (10, 6, 6.5, 6.0), (1, 10, 7.0, 4.0)],
    }[scene.trees]
    tip_x, tip_y = trunk[-1]
    for dx, dy, wide, high in blobs:
        cx = tip_x + dx + random.uniform(-1.2, 1.2)
        cy = tip_y + dy + random.uniform(-1, 1)
        around = np.arctan2(_Y - cy, _X - cx)
        ragged = 1 + 0.1 * np.sin(around * 7 + random.uniform(0, 6.28))
        inside = (ragged - np.hypot((_X - cx) / wide, (_Y - cy) / high)) * min(wide, high)
        _lay(canvas, leaf, _edge(inside) * 0.95)
        _lay(canvas, leaf * 0.72, 0.5 * _edge(inside) * np.clip((_Y - cy) / high, 0, 1))
