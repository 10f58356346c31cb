"""Scenes, pictures and sentences: the same number is always the same scene."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from training.captions import write
from training.dataset import scene
from training.painter import paint
from training.scenes import ATTRIBUTES, Geometry, Landscape, attributes, draw_geometry, is_held_out


def test_the_same_number_is_the_same_picture_and_sentence() -> None:
    for index in (0, 1, 17, 4711):
        one, another = scene(1, index), scene(1, index)
        assert one[0] == another[0]
        assert (paint(*one) == paint(*another)).all()
        assert write(*one) == write(*another)


def test_pictures_differ() -> None:
    digests = {hashlib.sha256(paint(*scene(1, index)).tobytes()).digest() for index in range(60)}
    assert len(digests) == 60


def test_what_is_held_out_is_never_drawn_for_training() -> None:
    random = np.random.default_rng(0)
    kept = [draw_geometry(random, held_out=True) for _ in range(200)]
    trained = [scene(1, index)[0] for index in range(1500)]
    shapes = [what for what in trained if isinstance(what, Geometry)]
    assert all(is_held_out(what) for what in kept)
    assert not any(is_held_out(what) for what in shapes)
    combined = {
        (what.kind, what.word, tuple((t.shape, t.colour) for t in what.things)) for what in shapes
    }
    assert not combined & {
        (what.kind, what.word, tuple((t.shape, t.colour) for t in what.things)) for what in kept
    }


def test_things_do_not_touch_each_other_or_the_border() -> None:
    for index in range(1500):
        what, _ = scene(2, index)
        if isinstance(what, Geometry):
            for thing in what.things:
                reach = thing.radius / 128
                assert reach < thing.x < 1 - reach
                assert reach < thing.y < 1 - reach
            for one, other in itertools.combinations(what.things, 2):
                gap = 128 * np.hypot(one.x - other.x, one.y - other.y)
                assert gap > one.radius + other.radius


@pytest.mark.parametrize("chinese", [False, True])
def test_sentences_tell_what_is_there(chinese: bool) -> None:
    seen = 0
    for index in range(400):
        what, random = scene(3, index)
        text = write(what, random)
        assert 0 < len(text) < 300
        assert "  " not in text
        if text.isascii() == chinese:
            continue
        seen += 1
        if isinstance(what, Geometry) and not chinese:
            assert what.ground in text
            assert all(thing.colour in text and thing.shape in text for thing in what.things)
        if isinstance(what, Landscape) and what.boats:
            assert ("船" if chinese else "boat") in text
    assert seen > 40


def test_attributes_are_in_their_tables() -> None:
    for index in range(300):
        what, _ = scene(4, index)
        numbers = attributes(what)
        assert len(numbers) == len(ATTRIBUTES)
        for number, values in zip(numbers, ATTRIBUTES.values(), strict=True):
            assert -1 <= number < len(values)
