"""Turn pydantic's validation errors into danqing's, with the value seen and the values allowed."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from danqing.errors import RequestError, UnknownSettingError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

_OUT_OF_RANGE = ("greater_than_equal", "less_than_equal", "literal_error")
_SEEN = 80
"""Characters of a value that an error repeats."""


def explain(
    error: ValidationError, model: type[BaseModel], *, noun: str = "setting"
) -> RequestError:
    """Return the first fault of a validation as an error to raise.

    Args:
        error: that pydantic raised.
        model: that was validated; its fields give the values allowed.
        noun: for its fields, in errors.
    """
    fault = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, fault["loc"])) or "value"
    value, kind = fault.get("input"), fault["type"]
    seen = repr(value[:_SEEN] if isinstance(value, str) else value)[:_SEEN]
    allowed = fault["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return UnknownSettingError(
            f"unknown {noun} {name!r}",
            seen=name,
            allowed=", ".join(model.model_fields),
            setting=name,
        )
    if kind == "missing":
        required = [name for name, field in model.model_fields.items() if field.is_required()]
        return RequestError(
            f"{name} is missing", allowed=f"required: {', '.join(required)}", setting=name
        )
    what = f"invalid {name}"
    if kind in _OUT_OF_RANGE:
        what = what if kind == "literal_error" else f"{name} is out of range"
        allowed = allowed_values(model, name) or allowed
    return RequestError(what, seen=seen, allowed=allowed, setting=name)


@lru_cache(maxsize=32)  # it takes a millisecond, and a server answers many invalid requests
def _properties(model: type[BaseModel]) -> dict[str, Any]:
    properties: dict[str, Any] = model.model_json_schema()["properties"]
    return properties


def allowed_values(model: type[BaseModel], name: str) -> str | None:
    """Return the values of a field in words; None if it has no bounds and no choices."""
    schema = _properties(model).get(name, {})
    for option in [schema, *schema.get("anyOf", [])]:
        if "enum" in option:
            return ", ".join(map(str, option["enum"]))
        if "minimum" in option and "maximum" in option:
            kind = "whole numbers from " if option["type"] == "integer" else ""
            return f"{kind}{option['minimum']} to {option['maximum']}"
    return None
