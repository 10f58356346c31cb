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
    resolved, _ = spec.resolve(Wider(prompt="a cat"))
    assert isinstance(resolved, Wider)
    with pytest.raises(NoEffectError, match="strength has no effect") as caught:
        spec.resolve(Wider(prompt="a cat", strength=0.5))
    assert caught.value.setting == "strength"
    with pytest.raises(NoEffectError, match="loops has no effect"):
        spec.resolve(Wider(prompt="a cat", loops=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_is_taken_or_has_a_reason(family: str) -> None:
    spec: ModelSpec = importlib.import_module(FAMILIES[family]).spec()
    assert set(Request.model_fields) == spec.takes | spec.no_effect.keys()
