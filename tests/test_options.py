"""`Options`: how a model runs, checked once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import danqing
from danqing.errors import RequestError, UnknownSettingError
from danqing.options import Options

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * GIB), ("7.5 gib", 15 * GIB // 2), ("12000MB", 12 * 10**9), ("4G", 4 * 10**9),
     ("1024", 1024), (GIB, GIB)],
)  # fmt: skip
def test_memory_sizes(text: str | int, size: int) -> None:
    assert Options(memory=text).memory == size


@pytest.mark.parametrize(
    "size", ["many", "-3GiB", "3XB", "", "1,5GiB", "8.GiB", "8GiB free", "9" * 400, "0", -1, 1.5]
)
def test_an_invalid_memory_size_is_refused(size: object) -> None:
    with pytest.raises(RequestError, match="invalid memory") as refused:
        Options(memory=size)
    assert refused.value.seen in (repr(size), repr(str(size)[:80])[:80])
    assert refused.value.allowed == "8GiB, 12000MB, ..."


@pytest.mark.parametrize(
    ("options", "seen", "allowed"),
    [({"placement": "cloud"}, "'cloud'", "auto, resident, staged, streamed"),
     ({"quantize": "int4"}, "'int4'", "off, int8"),
     ({"deterministic": "yes"}, "'yes'", None), ({"tile": 1.5}, "1.5", None),
     ({"place": ["vae"]}, "['vae']", None), ({"components": {"vae": 3}}, "3", None),
     ({"prompt_cache": 3}, "3", None)],
)  # fmt: skip
def test_an_invalid_value_is_named(options: dict[str, Any], seen: str, allowed: str | None) -> None:
    (name,) = options
    with pytest.raises(RequestError, match=name) as refused:
        Options(**options)
    assert refused.value.seen == seen
    assert allowed in (None, refused.value.allowed)


def test_an_unknown_option_is_refused_with_the_allowed() -> None:
    with pytest.raises(UnknownSettingError) as refused:
        danqing.open("pocket", quantization="int8")
    assert refused.value.seen == "quantization"
    assert refused.value.allowed == ", ".join(Options.model_fields)


def test_old_names_are_accepted() -> None:
    assert Options(quantise="int8", compile_with="inductor") == Options(
        quantize="int8", compile="inductor"
    )
    with pytest.raises(RequestError, match="the same option"):
        Options(quantise="int8", quantize="off")


def test_none_is_the_default() -> None:
    assert Options(memory=None, place=None, prompt_cache=None) == Options()


def test_typed_options_are_known_apart_from_defaults() -> None:
    options = Options(dtype="auto", components={"vae": Path("ae.safetensors")})
    assert options.typed == {"dtype": "auto", "components": {"vae": "ae.safetensors"}}
    assert options.replace(tile=256).typed == {**options.typed, "tile": "256"}
    assert options.replace(components=None).typed == {"dtype": "auto"}


def test_options_survive_json() -> None:
    options = Options(memory="8GiB", place={"vae": "cpu"}, deterministic=True)
    assert Options(**options.model_dump(mode="json")) == options
