"""The OpenAPI document: the API as this server's models take it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi

from danqing.request import MAX_PROMPT_CHARACTERS
from danqing.serve.bodies import PLAIN_TEXT, SETTINGS, EditBody, GenerationBody
from danqing.serve.jobs import MEDIA_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI

    from danqing.runner import Spec
    from danqing.serve.bodies import Body
    from danqing.serve.limits import Limits
    from danqing.serve.service import Service

_JSON = "application/json"
_STREAM = "text/event-stream"
_NOT_BLANK = r"\S"


def describe_api(app: FastAPI, service: Service) -> dict[str, Any]:
    """Describe the API as this server's models take it."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    specs = service.specs
    paths = document["paths"]
    generate = paths["/v1/images/generations"]["post"]
    generate["requestBody"] = {
        "required": True,
        "content": {_JSON: {"schema": describe(GenerationBody, specs, service.limits)}},
    }
    editing = {n: spec for n, spec in specs.items() if "image" in spec.takes}
    if editing:
        paths["/v1/images/edits"]["post"]["requestBody"] = _edit_body(editing, service)
    else:
        del paths["/v1/images/edits"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            operation["responses"] = _responses(path)
            operation["operationId"] = f"{method} {path}"
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "model":
                    parameter["schema"] = {"type": "string", "enum": list(specs)}
    document["components"] = {
        "schemas": {"Error": _ERROR},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    document["security"] = [{}, {"key": []}]
    app.openapi_schema = document
    return document


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_PICTURES = {
    "type": "object",
    "required": ["created", "data", "usage", "job"],
    "properties": {
        "created": {"type": "integer"},
        "job": {"type": "string"},
        "usage": {"type": "object"},
        "data": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"b64_json": {"type": "string"}, "url": {"type": "string"}},
            },
        },
    },
}
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}


def _edit_body(specs: Mapping[str, Any], service: Service) -> dict[str, Any]:
    schema = describe(EditBody, specs, service.limits)
    file = {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP."}
    for variant in schema["anyOf"]:
        variant["properties"] = {**variant["properties"], "image": file}
        variant["required"] = [*variant["required"], "image"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _responses(path: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    fine: dict[str, Any] = {_JSON: {"schema": {"type": "object"}}}
    codes = {"401": "Missing or wrong API key."}
    found: dict[str, Any] = {}
    if path == "/metrics":
        fine = {"text/plain": {"schema": {"type": "string"}}}
    elif path.startswith("/v1/images"):
        fine = {_JSON: {"schema": _PICTURES}, _STREAM: {"schema": _EVENT}}
        codes |= {
            "400": "Invalid request.", "404": "Unknown model.", "408": "The request was too slow.",
            "409": "The Idempotency-Key stands for another request, or the job was cancelled.",
            "413": "The body is too large: 1 MiB of JSON, 64 MiB of a form.",
            "415": "Unsupported media type.",
            "429": "Too many jobs: retry after Retry-After seconds.",
            "421": "The Host header is not a name of this server.",
            "500": "The image is broken.", "503": "The server is starting or shutting down.",
            "504": "The images were not finished in time.", "507": "The device ran out of memory.",
        }  # fmt: skip
        found["202"] = {
            "description": "Accepted, with Prefer: respond-async.",
            "content": {_JSON: {"schema": {"type": "object"}}},
        }
    elif path == "/readyz":
        found["503"] = {"description": "Not ready.", "content": fine}
    elif "{" in path:
        codes["404"] = "Not found."
        if path.startswith("/v1/jobs"):
            codes |= {
                "500": "The journal cannot be read.",
                "503": "The journal is busy, or the server is shutting down.",
            }
        if path.endswith("{number}"):
            raw = {"schema": {"type": "string", "format": "binary"}}
            fine = dict.fromkeys(MEDIA_TYPES.values(), raw)
    for status, meaning in codes.items():
        found[status] = {"description": meaning, "content": error}
    return {"200": {"description": "Done.", "content": fine}, **found}


# --- bodies ----------------------------------------------------------------------------------


def describe(kind: type[Body], specs: Mapping[str, Spec], limits: Limits) -> dict[str, Any]:
    """Return the JSON schema of a body exactly as this server takes it.

    Fields that have an effect only beside another make variants: with `stream`, and by
    `output_format`.

    Args:
        kind: of which request.
        specs: of the models by name.
        limits: of the server.
    """
    schema = kind.model_json_schema()
    fields: dict[str, dict[str, Any]] = schema["properties"]
    fields["prompt"]["allOf"] = [{"pattern": pattern} for pattern in (_NOT_BLANK, PLAIN_TEXT)]
    fields["model"] |= {"enum": [*specs, None]}
    for name, most in _bounds(specs, limits).items():
        number = _value(fields[name])
        number["maximum"] = min(most, number["maximum"])
    _value(fields["size"])["pattern"] = _size_pattern(limits.side)
    for name in SETTINGS & fields.keys():
        if all(name not in spec.takes for spec in specs.values()):
            fields[name] = {"type": "null", "description": "Has no effect in the models here."}
        elif _value(fields[name]) == {"type": "string"}:
            _value(fields[name]).update(maxLength=MAX_PROMPT_CHARACTERS, pattern=PLAIN_TEXT)
    still: dict[str, Any] = {"stream": {"enum": [False, None]}}
    still |= {"partial_images": {"enum": [0, None]}, "progress": {"enum": [False, None]}}
    png = {"output_format": {"enum": ["png", None]}, "output_compression": {"enum": [100, None]}}
    streams = {"stream": {"const": True}}
    lossy = {"output_format": {"enum": ["jpeg", "webp"]}}
    variants = [
        {**schema, "properties": {**fields, **by, **how}, "required": sorted({"prompt", *needs})}
        for by, how, needs in (
            (still, png, ()),
            (still, lossy, ("output_format",)),
            (streams, png, ("stream",)),
            (streams, lossy, ("output_format", "stream")),
        )
    ]
    return {"title": schema["title"], "anyOf": variants}


def _bounds(specs: Mapping[str, Spec], limits: Limits) -> dict[str, int]:
    """Return the largest values that this server or all its models take."""
    found = {"n": limits.pictures, "num_inference_steps": limits.steps}
    for name in SETTINGS - found.keys():
        own = [spec.limits[name] for spec in specs.values() if name in spec.limits]
        if len(own) == len(specs):
            found[name] = max(own)
    return found


def _value(field: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an optional field's schema that says what it is when it is there."""
    found: dict[str, Any] = field["anyOf"][0]
    return found


def _size_pattern(most: int) -> str:
    side = _whole_numbers(most)
    return f"^(auto|({side})x({side}))$"


def _whole_numbers(most: int) -> str:
    """Return a pattern for 8 to `most`, without leading zeros."""
    text = str(most)
    parts = ["[89]"] + [f"[1-9][0-9]{{{digits}}}" for digits in range(1, len(text) - 1)]
    for place, digit in enumerate(text):
        low = 1 if place == 0 else 0
        if int(digit) > low:
            rest = len(text) - place - 1
            parts.append(
                f"{text[:place]}[{low}-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else "")
            )
    return "|".join([*parts, text])
