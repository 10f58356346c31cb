"""What a picture shows, as plain values: landscapes and geometric scenes, and their attributes.

A scene is drawn from a random generator; the painter turns it into pixels and the writer into a
sentence. The combinations of colours, shapes, places and counts that `is_held_out` names are never
drawn for training, so that the finished model can be asked for what it has not seen.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from danqing.pocket.geometry import CELLS, COLOURS, GROUNDS, RELATIONS, SHAPES

if TYPE_CHECKING:
    import numpy as np

HELD_OUT_PERCENT = 12

MOUNTAIN_COLOURS = ("blue", "green", "grey", "purple", "red", "golden")
BODY_COLOURS = {"sun": ("red", "golden", "orange"), "moon": ("white", "golden")}
PLACES = ("left", "middle", "right")
TIMES = ("day", "dusk", "night")
SEASONS = ("spring", "summer", "autumn", "winter")
TREES = ("pine", "willow", "blossom", "maple", "bare")
SAILS = ("white", "red", "brown")
MAX_MOUNTAINS = 4
SEASON_OF_TREE = {"blossom": "spring", "willow": "summer", "maple": "autumn", "bare": "winter"}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape: its names, its centre as fractions of the sides, its radius in pixels of 128."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Things on a plain ground.

    Attributes:
        kind: `one` (a thing in a cell), `pair` (two things in a relation), `many` (like things).
        word: the cell or the relation; empty where the sentence says nothing of it.
        ground: the ground's colour.
        things: what is there.
    """

    kind: str
    word: str
    ground: str
    things: tuple[Thing, ...]


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """A landscape; an empty word or a count of 0 is something that is not there.

    Attributes:
        time: of day.
        season: of the year; shown by the trees and, in winter, by snow on the mountains.
        body: `sun`, `moon` or nothing; with its colour and place.
        mountains: how many; with their colour.
        water: whether the lower part is a lake.
        boats: how many; with the sails' colour and, of a single one, the place.
        trees: kind of trees on the bank.
        birds: how many: 0, 2, 3 or 5 ("a flock").
        pavilion: whether there is one on the bank.
        mist: whether there is mist between the mountains.
        bank: side of the bank in front, if there is anything on it.
        told: names of the attributes that the sentence tells; the others are the painter's choice.
    """

    time: str
    season: str
    body: str
    body_colour: str
    body_place: str
    mountains: int
    mountain_colour: str
    water: bool
    boats: int
    sail: str
    boat_place: str
    trees: str
    birds: int
    pavilion: bool
    mist: bool
    bank: str
    told: frozenset[str]


Scene = Geometry | Landscape


def is_held_out(scene: Geometry) -> bool:
    """Say whether a combination is kept from training; it does not depend on any seed."""
    names = sorted(f"{thing.colour} {thing.shape}" for thing in scene.things[:2])
    if scene.kind == "pair":
        names = [f"{thing.colour} {thing.shape}" for thing in scene.things]
    key = f"{scene.kind}/{len(scene.things)}/{scene.word}/{'/'.join(names)}"
    return zlib.crc32(key.encode()) % 100 < HELD_OUT_PERCENT


def draw_geometry(random: np.random.Generator, *, held_out: bool = False) -> Geometry:
    """Draw a geometric scene from those for training, or from those held out."""
    while True:
        scene = _geometry(random)
        if is_held_out(scene) == held_out:
            return scene


def _geometry(random: np.random.Generator) -> Geometry:
    kind = str(random.choice(["one", "pair", "many"], p=[0.3, 0.42, 0.28]))
    ground = _pick(random, tuple(GROUNDS))
    colours = tuple(name for name in COLOURS if name != ground)
    if kind == "one":
        return _one(random, ground, colours)
    if kind == "pair":
        return _pair(random, ground, colours)
    return _many(random, ground, colours)


def _one(random: np.random.Generator, ground: str, colours: tuple[str, ...]) -> Geometry:
    word = _pick(random, tuple(CELLS))
    x, y = CELLS[word]
    if random.random() < 0.15:  # the sentence says no place: it is near the middle
        word, (x, y) = "", CELLS["middle"]
    thing = Thing(
        shape=_pick(random, tuple(SHAPES)),
        colour=_pick(random, colours),
        x=x + random.uniform(-0.03, 0.03),
        y=y + random.uniform(-0.03, 0.03),
        radius=random.uniform(17, 23),
    )
    return Geometry(kind="one", word=word, ground=ground, things=(thing,))


def _pair(random: np.random.Generator, ground: str, colours: tuple[str, ...]) -> Geometry:
    word = _pick(random, tuple(RELATIONS))
    across, down = RELATIONS[word]
    x, y = random.uniform(0.46, 0.54, 2)
    gap = random.uniform(0.215, 0.245)
    first, second = random.uniform(16, 21, 2)
    while True:
        names = [(_pick(random, tuple(SHAPES)), _pick(random, colours)) for _ in range(2)]
        if names[0] != names[1]:
            break
    things = tuple(
        Thing(
            shape=shape,
            colour=colour,
            x=x + sign * across * gap + random.uniform(-0.015, 0.015),
            y=y + sign * down * gap + random.uniform(-0.015, 0.015),
            radius=radius,
        )
        for sign, radius, (shape, colour) in zip((1, -1), (first, second), names, strict=True)
    )
    return Geometry(kind="pair", word=word, ground=ground, things=things)


_ARRANGEMENTS = {
    2: [(0.27, 0.5), (0.73, 0.5)],
    3: [(0.26, 0.68), (0.74, 0.68), (0.5, 0.27)],
    4: [(0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)],
}


def _many(random: np.random.Generator, ground: str, colours: tuple[str, ...]) -> Geometry:
    count = int(random.integers(2, 5))
    shape, colour = _pick(random, tuple(SHAPES)), _pick(random, colours)
    radius = random.uniform(14.5, 18)
    dx, dy = random.uniform(-0.025, 0.025, 2)
    things = tuple(
        Thing(
            shape=shape,
            colour=colour,
            x=x + dx + random.uniform(-0.02, 0.02),
            y=y + dy + random.uniform(-0.02, 0.02),
            radius=radius,
        )
        for x, y in _ARRANGEMENTS[count]
    )
    return Geometry(kind="many", word="", ground=ground, things=things)


def draw_landscape(random: np.random.Generator) -> Landscape:
    """Draw a landscape and what its sentence tells of it."""
    maybe = random.random
    time = str(random.choice(TIMES, p=[0.55, 0.2, 0.25]))
    season = _pick(random, SEASONS)
    body = ("moon" if time == "night" else "sun") if maybe() < 0.78 else ""
    water = maybe() < 0.72
    boats = int(random.choice([1, 2, 3], p=[0.72, 0.18, 0.1])) if water and maybe() < 0.6 else 0
    trees = _trees(random, season) if maybe() < 0.5 else ""
    pavilion = maybe() < 0.25
    bank = _pick(random, ("left", "right")) if trees or pavilion else ""
    if bank and boats:  # nothing stands in front of a boat
        boats = 1
    scene = {
        "time": time,
        "season": season,
        "body": body,
        "body_colour": _pick(random, BODY_COLOURS[body]) if body else "",
        "body_place": _pick(random, PLACES) if body else "",
        "mountains": int(random.choice([0, 1, 2, 3, 4], p=[0.06, 0.22, 0.24, 0.28, 0.2])),
        "mountain_colour": _pick(random, MOUNTAIN_COLOURS),
        "water": water,
        "boats": boats,
        "sail": _pick(random, SAILS) if boats else "",
        "trees": trees,
        "birds": int(random.choice([2, 3, 5])) if maybe() < 0.3 else 0,
        "pavilion": pavilion,
        "mist": maybe() < 0.25,
        "bank": bank,
        "boat_place": _pick(random, tuple(p for p in PLACES if p != bank)) if boats == 1 else "",
    }
    chance = {
        "time": 1.0 if time != "day" else 0.4,
        "season": 0.35 if season != "winter" else 0.6,
        "body_colour": 0.75,
        "body_place": 0.3,
        "mountains": 0.92,
        "mountain_colour": 0.75,
        "water": 0.8,
        "sail": 0.35,
        "boat_place": 0.25,
        "bank": 0.3,
    }
    told = frozenset(
        name for name, how_often in chance.items() if scene[name] and maybe() < how_often
    )
    return Landscape(**scene, told=told)  # type: ignore[arg-type]


def _trees(random: np.random.Generator, season: str) -> str:
    if random.random() < 0.45:
        return "pine"
    return {tree_season: tree for tree, tree_season in SEASON_OF_TREE.items()}[season]


def _pick(random: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(random.integers(len(names)))]


# --- attributes: what the text encoders are taught to read ---------------------------------------

_NONE = ("",)
ATTRIBUTES: dict[str, tuple[object, ...]] = {
    "kind": ("landscape", "one", "pair", "many"),
    "ground": tuple(GROUNDS),
    "word": (*_NONE, *CELLS, *RELATIONS),
    "shape_1": tuple(SHAPES),
    "colour_1": tuple(COLOURS),
    "shape_2": (*_NONE, *SHAPES),
    "colour_2": (*_NONE, *COLOURS),
    "count": (1, 2, 3, 4),
    "time": (*_NONE, *TIMES),
    "season": (*_NONE, *SEASONS),
    "body": (*_NONE, "sun", "moon"),
    "body_colour": (*_NONE, "red", "golden", "orange", "white"),
    "body_place": (*_NONE, *PLACES),
    "mountains": ("", 0, 1, 2, 3, 4),
    "mountain_colour": (*_NONE, *MOUNTAIN_COLOURS),
    "water": (*_NONE, False, True),
    "boats": (0, 1, 2, 3),
    "sail": (*_NONE, *SAILS),
    "boat_place": (*_NONE, *PLACES),
    "trees": (*_NONE, *TREES),
    "birds": (0, 2, 3, 5),
    "pavilion": (False, True),
    "mist": (False, True),
    "bank": (*_NONE, "left", "right"),
}
"""Every attribute with its values; the empty word is what the sentence does not tell."""

_ALWAYS = frozenset({"body", "boats", "trees", "birds", "pavilion", "mist"})


def attributes(scene: Scene) -> list[int]:
    """Return the number of each attribute's value, as told; -1 where it has no meaning."""
    values: dict[str, object] = {}
    if isinstance(scene, Geometry):
        first, last = scene.things[0], scene.things[-1]
        pair = scene.kind == "pair"
        values = {
            "kind": scene.kind,
            "ground": scene.ground,
            "word": scene.word,
            "shape_1": first.shape,
            "colour_1": first.colour,
            "shape_2": last.shape if pair else "",
            "colour_2": last.colour if pair else "",
            "count": 1 if pair else len(scene.things),
        }
    else:
        values = {"kind": "landscape"}
        for field in fields(scene):
            if field.name != "told":
                shown = field.name in scene.told or field.name in _ALWAYS
                values[field.name] = getattr(scene, field.name) if shown else ""
    return [
        options.index(values[name]) if name in values else -1
        for name, options in ATTRIBUTES.items()
    ]
