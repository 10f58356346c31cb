"""The judge against the painter, whose pictures are known; no model is involved."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from danqing.pocket.geometry import COLOURS, SHAPES
from danqing.pocket.judge import Wanted, cell_of, judge, look, patches
from training import evaluate
from training.painter import paint
from training.scenes import draw_geometry


def picture(seed: int) -> tuple[Image.Image, Wanted]:
    random = np.random.default_rng([99, seed])
    scene = draw_geometry(random, held_out=seed % 2 == 0)
    return Image.fromarray(paint(scene, random)), evaluate.wanted(scene)


def test_the_judge_sees_what_was_painted() -> None:
    found = evaluate.detector(600)
    for name in ("colour", "shape", "relation", "time", "light's colour", "boat", "boats"):
        assert found[name]["percent"] >= 99, (name, found[name])
    assert found["mountains"]["percent"] >= 97


@pytest.mark.parametrize("side", [96, 128, 200, 256])
def test_pictures_of_other_sizes(side: int) -> None:
    right = 0
    for seed in range(40):
        image, wanted = picture(seed)
        verdict = judge(image.resize((side, side), Image.Resampling.BICUBIC), wanted)
        right += verdict.colour and verdict.shape and verdict.relation is not False
    assert right >= 39


def test_what_is_wrong_is_called_wrong() -> None:
    """Every wrong colour, shape, count and place is noticed."""
    for seed in range(60):
        image, wanted = picture(seed)
        (shape, colour), *rest = wanted.things
        other_colour = next(name for name in COLOURS if name != colour)
        other_shape = next(name for name in SHAPES if name != shape)
        recoloured = judge(image, with_things(wanted, (shape, other_colour), *rest))
        assert not recoloured.colour
        reshaped = judge(image, with_things(wanted, (other_shape, colour), *rest))
        assert not reshaped.shape
        more = judge(image, with_things(wanted, *wanted.things, (shape, colour)))
        assert not more.colour
        assert not more.shape
        if wanted.word in ("above", "left of"):
            turned = {"above": "below", "left of": "right of"}[wanted.word]
            moved = judge(image, Wanted(things=wanted.things, word=turned, ground=wanted.ground))
            assert moved.colour
            assert moved.shape
            assert moved.relation is False


def with_things(wanted: Wanted, *things: tuple[str, str]) -> Wanted:
    return Wanted(things=things, word=wanted.word, ground=wanted.ground)


def test_swapped_colours_are_right_colours_in_the_wrong_place() -> None:
    image = Image.new("RGB", (128, 128), (248, 246, 240))
    image.paste((200, 48, 40), (50, 20, 80, 50))
    image.paste((38, 84, 172), (50, 80, 80, 110))
    things = (("square", "blue"), ("square", "red"))
    verdict = judge(image, Wanted(things=things, word="above", ground="white"))
    assert verdict.colour
    assert verdict.shape
    assert verdict.relation is False


def test_an_empty_and_a_noisy_picture() -> None:
    ground, things = look(Image.new("RGB", (128, 128), (28, 26, 30)))
    assert (ground, things) == ("black", [])
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    wanted = Wanted(things=(("circle", "red"),), word="", ground="white")
    verdict = judge(Image.fromarray(noise), wanted)
    assert not verdict.colour
    assert not verdict.shape


def test_patches_hang_together_by_their_edges() -> None:
    mask = np.array(
        [[1, 0, 1, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [1, 0, 1, 1, 1]], dtype=bool
    )
    assert [int(patch.sum()) for patch in patches(mask)] == [5, 4, 1, 1]


def test_cells() -> None:
    for seed in range(200):
        image, wanted = picture(seed)
        if len(wanted.things) == 1 and wanted.word:
            _, things = look(image)
            assert cell_of(things[0]) == wanted.word
