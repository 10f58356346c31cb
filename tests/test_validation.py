"""One translation of pydantic's errors: what, seen, allowed, setting."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from danqing.errors import RequestError, UnknownSettingError
from danqing.validation import allowed_values, explain


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    count: Annotated[int, Field(ge=1, le=9)] | None = None
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    how: Literal["keep", "stretch"] | None = None

    @field_validator("name")
    @classmethod
    def _check(cls, name: str) -> str:
        if not name.isascii():
            raise ValueError("ASCII letters")
        return name


@pytest.mark.parametrize(
    ("values", "what", "seen", "allowed"),
    [
        ({"name": "x", "colour": 1}, "unknown field 'colour'", "colour", "name, count, share, how"),
        ({}, "name is missing", None, "required: name"),
        ({"name": "x", "count": 10}, "count is out of range", "10", "whole numbers from 1 to 9"),
        ({"name": "x", "share": -0.5}, "share is out of range", "-0.5", "0 to 1"),
        ({"name": "x", "how": "cut"}, "invalid how", "'cut'", "keep, stretch"),
        ({"name": 7}, "invalid name", "7", "Input should be a valid string"),
        ({"name": "ä" * 500}, "invalid name", "'" + "ä" * 79, "ASCII letters"),
        ([], "invalid value", "[]", None),
    ],
)
def test_faults(values: Any, what: str, seen: str | None, allowed: str | None) -> None:
    with pytest.raises(ValidationError) as caught:
        Row.model_validate(values)
    error = explain(caught.value, Row, noun="field")
    assert isinstance(error, UnknownSettingError if "unknown" in what else RequestError)
    assert (error.what, error.seen) == (what, seen)
    assert allowed is None or error.allowed == allowed


def test_allowed_values_of_a_field() -> None:
    assert allowed_values(Row, "name") is None
    assert allowed_values(Row, "unknown") is None
