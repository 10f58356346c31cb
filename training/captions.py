"""Sentences for scenes: English in varied wording, and a simple Chinese one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.scenes import Geometry, Landscape

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from training.scenes import Scene, Thing

CHINESE_SHARE = 0.2


def write(scene: Scene, random: np.random.Generator) -> str:
    """Return a sentence that tells a scene."""
    chinese = random.random() < CHINESE_SHARE
    words = _Words(random)
    if isinstance(scene, Geometry):
        return _geometry_zh(scene, words) if chinese else _geometry(scene, words)
    return _landscape_zh(scene, words) if chinese else _landscape(scene, words)


class _Words:
    """Chooses wordings."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random

    def one_of(self, *options: str) -> str:
        return options[int(self._random.integers(len(options)))]

    def maybe(self, chance: float) -> bool:
        return bool(self._random.random() < chance)

    def shuffled(self, parts: Sequence[str]) -> list[str]:
        return [parts[int(place)] for place in self._random.permutation(len(parts))]


NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}


# --- geometric scenes ----------------------------------------------------------------------------


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _thing(thing: Thing) -> str:
    return _a(f"{thing.colour} {thing.shape}")


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _geometry(scene: Geometry, words: _Words) -> str:
    ground = words.one_of("ground", "ground", "background", "paper")
    on = f"on a {scene.ground} {ground}" if ground != "paper" else f"on {scene.ground} paper"
    first = _thing(scene.things[0])
    if scene.kind == "one":
        what = " ".join(part for part in (first, _place(scene.word, words)) if part)
    elif scene.kind == "pair":
        relation = {
            "above": words.one_of("above", "above", "over"),
            "below": words.one_of("below", "below", "under"),
            "left of": words.one_of("left of", "to the left of", "on the left of"),
            "right of": words.one_of("right of", "to the right of", "on the right of"),
        }[scene.word]
        what = f"{first} {relation} {_thing(scene.things[1])}"
    else:
        thing = scene.things[0]
        what = f"{NUMBERS[len(scene.things)]} {thing.colour} {_plural(thing.shape)}"
    return words.one_of(
        f"{what} {on}",
        f"{what} {on}",
        f"{what}, {on}",
        f"{on}, {what}",
        f"there is {what} {on}" if scene.kind != "many" else f"there are {what} {on}",
    )


def _place(word: str, words: _Words) -> str:
    if not word:
        return ""
    if word == "middle":
        return words.one_of("in the middle", "in the center", "in the centre")
    if word in ("top", "bottom"):
        return f"at the {word}"
    if word in ("left", "right"):
        return words.one_of(f"on the {word}", f"at the {word}", f"on the {word} side")
    row, side = word.split()
    plain = {"upper": "top", "lower": "bottom"}[row]
    return words.one_of(
        f"in the {word}",
        f"in the {word} corner",
        f"at the {word}",
        f"in the {plain} {side}",
        f"in the {plain} {side} corner",
    )


_ZH = {
    "red": "红", "orange": "橙", "yellow": "黄", "green": "绿", "blue": "蓝", "purple": "紫",
    "black": "黑", "white": "白", "cream": "米", "pink": "粉", "grey": "灰", "golden": "金",
    "circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "ring": "圆环",
    "cross": "十字", "upper left": "左上", "upper right": "右上", "lower left": "左下",
    "lower right": "右下", "top": "上方", "bottom": "下方", "left": "左边", "right": "右边",
    "middle": "中间", "above": "上面", "below": "下面", "left of": "左边", "right of": "右边",
    "brown": "褐",
}  # fmt: skip
_ZH_NUMBERS = {1: "一", 2: "两", 3: "三", 4: "四", 5: "五"}


def _geometry_zh(scene: Geometry, words: _Words) -> str:
    def name(thing: Thing) -> str:
        return f"{_ZH[thing.colour]}色{_ZH[thing.shape]}"

    ground = f"{_ZH[scene.ground]}色{words.one_of('背景', '底')}"
    first = name(scene.things[0])
    if scene.kind == "one":
        place = f"{_ZH[scene.word]}" if scene.word else ""
        return f"{ground}，{place}一个{first}"
    if scene.kind == "pair":
        return f"{ground}，{first}在{name(scene.things[1])}的{_ZH[scene.word]}"
    return f"{ground}，{_ZH_NUMBERS[len(scene.things)]}个{first}"


# --- landscapes ----------------------------------------------------------------------------------


def _landscape(scene: Landscape, words: _Words) -> str:
    start = _mountains(scene, words)
    body = _body(scene, words)
    parts = [
        part
        for part in (
            _water(scene, words), _trees(scene, words), _birds(scene, words),
            _pavilion(scene, words), _mist(scene, words),
        )
        if part
    ]  # fmt: skip
    parts = words.shuffled(parts)
    if start and body and words.maybe(0.6):
        start = f"{start} {words.one_of('under', 'under', 'below', 'beneath')} {body}"
    elif body:
        parts.insert(int(words.maybe(0.5)) * len(parts), body)
    when = _when(scene, words)
    if start:
        parts.insert(0, start)
    if when and (not parts or words.maybe(0.4)):
        parts.insert(0 if words.maybe(0.5) else len(parts), when)
    elif when:
        parts[0] = f"{parts[0]} {when}"
    text = parts[0] if parts else "a landscape"
    for part in parts[1:]:
        text += words.one_of(", ", ", ", ", ", " and ", " with ") + part
    return words.one_of("", "", "", "a painting of ", "an ink painting of ") + text


def _mountains(scene: Landscape, words: _Words) -> str:
    colour = scene.mountain_colour if "mountain_colour" in scene.told else ""
    if colour == "golden":
        colour = words.one_of("golden", "golden", "yellow")
    elif colour == "grey":
        colour = words.one_of("grey", "gray", "grey")
    snowy = scene.season == "winter" and "season" in scene.told and words.maybe(0.4)
    adjectives = " ".join(part for part in ("snowy" if snowy else "", colour) if part)
    count = scene.mountains
    if not count:
        return words.one_of("no mountains", "a lake" if scene.water else "a plain", "")
    noun = words.one_of("mountain", "mountain", "mountain", "peak", "hill")
    phrase = f"{adjectives} {noun}".strip()
    if "mountains" not in scene.told:
        return f"{phrase}s"
    if count == 1:
        return words.one_of(_a(phrase), _a(phrase), f"one {phrase}", f"a single {phrase}")
    return f"{NUMBERS[count]} {phrase}s"


def _body(scene: Landscape, words: _Words) -> str:
    if not scene.body:
        return ""
    colour = scene.body_colour if "body_colour" in scene.told else ""
    if colour == "golden":
        colour = words.one_of("golden", "golden", "yellow")
    article = words.one_of("a", "a", "the")
    phrase = f"{colour} {scene.body}".strip()
    text = f"the {phrase}" if article == "the" else _a(phrase)
    if "body_place" in scene.told:
        place = {"left": "on the left", "right": "on the right", "middle": "in the middle"}
        text += f" {place[scene.body_place]}"
    return text


def _water(scene: Landscape, words: _Words) -> str:
    sail = f"with {_a(scene.sail + ' sail')}" if "sail" in scene.told else ""
    water = words.one_of("on the water", "on the lake", "on a lake", "on the river", "")
    if scene.boats == 1:
        place = ""
        if "boat_place" in scene.told:
            place = {"left": "on the left", "right": "on the right", "middle": "in the middle"}[
                scene.boat_place
            ]
        boat = words.one_of("a boat", "a boat", "one boat", "a small boat", "a sailing boat")
        return " ".join(part for part in (boat, sail, place or water) if part)
    if scene.boats:
        sail = f"with {scene.sail} sails" if sail else ""
        parts = (f"{NUMBERS[scene.boats]} boats", sail, water)
        return " ".join(part for part in parts if part)
    if scene.water and "water" in scene.told:
        return words.one_of("a lake", "a quiet lake", "water", "a river", "calm water")
    return ""


def _trees(scene: Landscape, words: _Words) -> str:
    if not scene.trees:
        return ""
    noun = {
        "pine": words.one_of("a pine", "a pine tree", "an old pine"),
        "willow": words.one_of("a willow", "a willow tree"),
        "blossom": words.one_of("a blossoming tree", "a cherry tree", "a plum tree in blossom"),
        "maple": words.one_of("a maple", "a red maple", "a maple tree"),
        "bare": words.one_of("a bare tree", "a tree without leaves"),
    }[scene.trees]
    return f"{noun} on the {_bank(scene)}" if "bank" in scene.told else noun


def _bank(scene: Landscape) -> str:
    return scene.bank


def _pavilion(scene: Landscape, words: _Words) -> str:
    if not scene.pavilion:
        return ""
    noun = words.one_of("a pavilion", "a pavilion", "a small pavilion")
    return noun + words.one_of("", "", " on the shore", " by the water" if scene.water else "")


def _birds(scene: Landscape, words: _Words) -> str:
    if not scene.birds:
        return ""
    if scene.birds == 5:
        noun = words.one_of("a flock of birds", "birds", "many birds", "five birds")
    else:
        noun = f"{NUMBERS[scene.birds]} birds"
    return noun + words.one_of("", "", " in the sky", " flying")


def _mist(scene: Landscape, words: _Words) -> str:
    return (
        words.one_of("mist", "mist", "fog", "clouds of mist", "morning mist") if scene.mist else ""
    )


def _when(scene: Landscape, words: _Words) -> str:
    parts = []
    if "time" in scene.told:
        parts.append(
            {
                "day": words.one_of("by day", "in daylight", "during the day"),
                "dusk": words.one_of("at dusk", "at sunset", "in the evening"),
                "night": words.one_of("at night", "at night", "in the night"),
            }[scene.time]
        )
    if "season" in scene.told:
        parts.append(f"in {scene.season}")
    return " ".join(words.shuffled(parts))


_ZH_TREES = {"pine": "松树", "willow": "柳树", "blossom": "花树", "maple": "枫树", "bare": "枯树"}
_ZH_SEASONS = {"spring": "春天", "summer": "夏天", "autumn": "秋天", "winter": "冬天"}
_ZH_TIMES = {"day": "白天", "dusk": "黄昏", "night": "夜晚"}


def _landscape_zh(scene: Landscape, words: _Words) -> str:
    parts = words.shuffled(
        [
            part
            for part in (
                _mountains_zh(scene),
                _body_zh(scene),
                _water_zh(scene, words),
                _trees_zh(scene),
                _birds_zh(scene),
                "一座亭子" if scene.pavilion else "",
                words.one_of("云雾", "雾") if scene.mist else "",
            )
            if part
        ]
    )
    when = ""
    if "season" in scene.told:
        when += _ZH_SEASONS[scene.season]
    if "time" in scene.told:
        when += _ZH_TIMES[scene.time]
    return "，".join(([when] if when else []) + parts) or "山水"


def _mountains_zh(scene: Landscape) -> str:
    if not scene.mountains:
        return ""
    colour = _ZH[scene.mountain_colour] if "mountain_colour" in scene.told else ""
    number = f"{_ZH_NUMBERS[scene.mountains]}座" if "mountains" in scene.told else ""
    return f"{number}{colour}山"


def _body_zh(scene: Landscape) -> str:
    if not scene.body:
        return ""
    colour = f"{_ZH[scene.body_colour]}色" if "body_colour" in scene.told else ""
    place = _ZH[scene.body_place] if "body_place" in scene.told else ""
    return f"{place}一轮{colour}{'太阳' if scene.body == 'sun' else '月亮'}"


def _water_zh(scene: Landscape, words: _Words) -> str:
    if scene.boats:
        sail = f"{_ZH[scene.sail]}帆" if "sail" in scene.told else ""
        place = _ZH[scene.boat_place] if "boat_place" in scene.told else ""
        water = words.one_of("水上", "湖上")
        return f"{place}{water}{_ZH_NUMBERS[scene.boats]}只{sail}船"
    if scene.water and "water" in scene.told:
        return words.one_of("湖水", "一片湖")
    return ""


def _trees_zh(scene: Landscape) -> str:
    if not scene.trees:
        return ""
    place = _ZH[scene.bank] if "bank" in scene.told else ""
    return f"{place}一棵{_ZH_TREES[scene.trees]}"


def _birds_zh(scene: Landscape) -> str:
    if not scene.birds:
        return ""
    return "一群鸟" if scene.birds == 5 else f"{_ZH_NUMBERS[scene.birds]}只鸟"
