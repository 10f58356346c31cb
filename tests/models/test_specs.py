"""What a model does not take is refused, also a setting that is added to `Request` tomorrow."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest

from danqing.errors import NoEffectError
from danqing.models import FAMILIES
from danqing.request import Request

if TYPE_CHECKING:
    from danqing.models.base import ModelSpec


class Wider(Request):
    strength: float | None = None
    loops: int = 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_setting_nobody_declared_is_refused(family: str) -> None:
    spec: ModelSpec = importlib.import_module(FAMILIES[family]).spec()
    assert isinstance(spec.resolve(Wider(prompt="a cat")).request, Wider)
    with pytest.raises(NoEffectError, match="strength has no effect") as caught:
        spec.resolve(Wider(prompt="a cat", strength=0.5))
    assert caught.value.setting == "strength"
    with pytest.raises(NoEffectError, match="loops has no effect"):
        spec.resolve(Wider(prompt="a cat", loops=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_is_taken_or_has_a_reason(family: str) -> None:
    spec: ModelSpec = importlib.import_module(FAMILIES[family]).spec()
    assert set(Request.model_fields) == spec.takes | spec.no_effect.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resolved_request_has_every_setting(family: str) -> None:
    spec: ModelSpec = importlib.import_module(FAMILIES[family]).spec()
    resolved = spec.resolve(Request(prompt="a cat", seed=7, num_images_per_prompt=3))
    assert None not in vars(resolved).values()
    assert resolved.seed == resolved.request.seed == 7
    assert resolved.single(2).request == resolved.request.replace(seed=9, num_images_per_prompt=1)
    assert resolved.single(2).seed == 9
    record = resolved.request.model_dump()
    assert {name for name in record if record[name] is None}.isdisjoint(spec.defaults)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_nobody_named_is_drawn_and_left_out_of_a_dry_run(family: str) -> None:
    spec: ModelSpec = importlib.import_module(FAMILIES[family]).spec()
    first, second = (spec.resolve(Request(prompt="a cat")) for _ in range(2))
    if "seed" in spec.defaults:
        assert first.forecast.seed == first.seed == second.seed == spec.defaults["seed"]
    else:
        assert first.seed != second.seed
        assert first.forecast.seed is None
        assert first.request.seed == first.seed
