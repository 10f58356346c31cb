"""Marks of single cases of a parametrised test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Container, Iterable


def slow_among(values: Iterable[Any], slow: Container[Any]) -> list[Any]:
    """Return the values as parameters, those in `slow` marked slow.

    Slow are tests of ten to forty seconds of which a quicker case is in every run.
    """
    return [pytest.param(v, marks=pytest.mark.slow) if v in slow else v for v in values]
