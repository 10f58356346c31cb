"""The HTTP side: routes, and the documents that describe them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from danqing.errors import (
    CancelledError,
    DanqingError,
    DeadlineError,
    NoEffectError,
    RequestError,
)
from danqing.request import MAX_IMAGES
from danqing.serve import answers
from danqing.serve.bodies import (
    EditBody,
    GenerationBody,
    describe,
    read_body,
    read_order,
    read_picture,
)
from danqing.serve.guards import RefusedError
from danqing.serve.jobs import MEDIA_TYPES, Ended, Finished, Moved, Stepped, digest_request
from danqing.serve.metrics import MEDIA_TYPE
from danqing.serve.service import plan_order
from danqing.version import __version__

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping

    from PIL.Image import Image

    from danqing.serve.jobs import Job
    from danqing.serve.metrics import Metrics
    from danqing.serve.service import Service

KEEP_ALIVE_SECONDS = 10.0
"""Between two signs of life of a stream that has nothing to say."""
MAX_FIELDS = 64
_ASYNC = "respond-async"  # RFC 7240, 4.1
_JSON = "application/json"
_STREAM = "text/event-stream"


def make_app(service: Service, metrics: Metrics) -> FastAPI:
    """Return the application of a service."""
    app = FastAPI(
        title="danqing", version=__version__, docs_url=None, redoc_url=None,
        description="Pictures from open models: the images API, and jobs.",
    )  # fmt: skip
    routes = _Routes(service, metrics)
    app.get("/healthz", summary="The process is up.")(routes.health)
    app.get("/readyz", summary="Models are loaded and devices answer.")(routes.ready)
    app.get("/metrics", summary="Figures for Prometheus.")(routes.figures)
    app.get("/v1/models", summary="The models here.")(routes.models)
    app.get("/v1/models/{model}", summary="One of them.")(routes.model)
    app.post("/v1/images/generations", summary="Paint pictures.")(routes.generations)
    app.post("/v1/images/edits", summary="Paint pictures from others.")(routes.edits)
    app.api_route("/v1/jobs/{job}", methods=["GET", "DELETE"], summary="A job; or give it up.")(
        routes.job
    )
    app.get("/v1/jobs/{job}/pictures/{number}", summary="One picture.")(routes.picture)
    app.add_exception_handler(DanqingError, _on_error)
    app.add_exception_handler(RefusedError, _on_refused)
    app.add_exception_handler(HTTPException, _on_http)
    app.openapi = lambda: _document(app, service)  # type: ignore[method-assign]
    return app


class _Routes:
    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics

    # --- the server ----------------------------------------------------------------------------

    async def health(self) -> Response:
        """The process is up."""
        return JSONResponse({"status": "up"})

    async def ready(self) -> Response:
        """Models are loaded and devices answer."""
        ready = await asyncio.to_thread(self._service.answers)
        body = {
            "status": "ready" if ready else self._service.state,
            "queue": self._service.depth,
            "running": self._service.running,
        }
        return JSONResponse(body, 200 if ready else 503)

    async def figures(self) -> Response:
        """Figures for Prometheus."""
        text = await asyncio.to_thread(self._metrics.text)
        return Response(text, media_type=MEDIA_TYPE)

    async def models(self) -> Response:
        """The models here."""
        rows = [self._describe(name) for name in self._service.specs]
        return JSONResponse({"object": "list", "data": rows})

    async def model(self, model: str) -> Response:
        """One of them."""
        name, _ = self._service.painter(model)
        return JSONResponse(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        _, painter = self._service.painter(name)
        spec, plan, checker = painter.spec, painter.plan, self._service.checker
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "danqing",
            "title": spec.title,
            "defaults": dict(spec.defaults),
            "no_effect": dict(spec.no_effect),
            "edits": "image" not in spec.no_effect,
            "max_side": self._service.limits.side,
            "safety_checker": "off" if checker is None else checker.name,
            "device": plan.device,
            "dtype": plan.dtype,
            "placement": plan.placement,
        }

    # --- pictures ------------------------------------------------------------------------------

    async def generations(self, request: Request) -> Response:
        """Paint pictures from words."""
        data = await request.body()
        self._want(request, _JSON)
        body = read_body(GenerationBody, _read_json(data), from_json=True)
        return await self._answer(request, body, [], hashlib.sha256(data).hexdigest())

    async def edits(self, request: Request) -> Response:
        """Paint pictures from others and words."""
        self._want(request, "multipart/form-data")
        fields, files = await _read_form(request)
        body = read_body(EditBody, fields, from_json=False)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        for data in files:
            digest.update(data)
        images = [
            await asyncio.to_thread(read_picture, data, f"image {number + 1}")
            for number, data in enumerate(files)
        ]
        return await self._answer(request, body, images, digest.hexdigest(), edits=True)

    @staticmethod
    def _want(request: Request, kind: str) -> None:
        """Refuse other bodies: a form is what pages of other sites could send unasked."""
        said = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if said != kind:
            raise HTTPException(415, f"the body must be {kind}, not {said or 'unnamed'}")

    async def _answer(
        self,
        request: Request,
        body: GenerationBody,
        images: list[Image],
        digest: str,
        *,
        edits: bool = False,
    ) -> Response:
        """Accept an order and answer as the client wishes."""
        service = self._service
        expires = time.monotonic() + service.limits.deadline
        name, painter = service.painter(body.model)
        if edits and "image" in painter.spec.no_effect:
            raise NoEffectError(
                f"{name} does not edit", seen=painter.spec.no_effect["image"], setting="image"
            )
        order = read_order(body, name, images, most=service.limits.side, edits=edits)
        idempotency = _idempotency(request)
        later = _ASYNC in request.headers.get("prefer", "")
        # another thread costs a third of a millisecond each time: only for what may take longer
        order = await _perhaps_elsewhere(bool(images), plan_order, painter, order, service.limits)
        submitting = _perhaps_elsewhere(
            service.journal is not None,
            service.submit,
            order,
            request.state.client,
            idempotency=idempotency,
            digest=digest_request(body.model_dump(exclude_none=True), order),
            sent_digest=digest,
            # who has a name for it may come back
            detached=later or idempotency is not None,
            expires=expires,
        )
        job = await self._submitted(submitting, expires)
        base = str(request.base_url).rstrip("/") if body.response_format == "url" else None
        headers = {"x-job-id": job.id}
        if later:
            there = {"location": f"/v1/jobs/{job.id}", "preference-applied": _ASYNC}
            return JSONResponse(answers.job_response(service, job), 202, {**headers, **there})
        if body.stream:
            events = self._events(job, progress=bool(body.progress))
            return StreamingResponse(
                events, media_type=_STREAM, headers={**headers, "cache-control": "no-store"}
            )
        await self._wait(request, job)
        if job.error is not None:
            raise job.error
        if job.state != "done":  # its client went away, so nobody reads this
            raise CancelledError("the request ended before the job did")
        return JSONResponse(answers.images_response(service, job, base=base), headers=headers)

    async def _submitted(self, submitting: Coroutine[Any, Any, Job], expires: float) -> Job:
        """Return the accepted job; give up at the deadline, even if the journal's disk hangs."""
        task = asyncio.ensure_future(submitting)
        done, _ = await asyncio.wait([task], timeout=expires - time.monotonic())
        if not done:
            task.add_done_callback(self._leave_late)
            raise DeadlineError("the request was not accepted in time", hint="ask again later")
        return task.result()

    def _leave_late(self, task: asyncio.Task[Job]) -> None:
        """Leave a job that was accepted after its client had been answered."""
        if not task.cancelled() and task.exception() is None:
            self._service.leave(task.result())

    async def _wait(self, request: Request, job: Job) -> None:
        """Wait until a job has ended, or its client went away."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        async def over() -> None:
            async for _ in job.follow(all_of_it=False):
                pass

        waiting = [asyncio.ensure_future(over()), asyncio.ensure_future(gone())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            self._service.leave(job)
        if waiting[0].done() and not waiting[0].cancelled():
            waiting[0].result()  # if following failed, that is the answer

    async def _events(self, job: Job, *, progress: bool) -> AsyncIterator[bytes]:
        """Yield a job's events as they happen; a sign of life where there is none."""
        happening = job.follow()
        try:
            coming = asyncio.ensure_future(anext(happening))
            while True:
                done, _ = await asyncio.wait([coming], timeout=KEEP_ALIVE_SECONDS)
                if not done:
                    yield b": still here\n\n"
                    continue
                event = coming.result()
                if isinstance(event, Ended):
                    break
                coming = asyncio.ensure_future(anext(happening))
                for text in self._texts(job, event, progress=progress):
                    yield text
            if job.error is not None:
                yield answers.error_event(job.error)
        finally:
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await coming
            await happening.aclose()  # type: ignore[attr-defined]
            self._service.leave(job)

    def _texts(self, job: Job, event: Any, *, progress: bool) -> list[bytes]:
        if isinstance(event, Finished):
            return [answers.completed_event(self._service, job, event.picture, event.index)]
        found = []
        if isinstance(event, Stepped):
            preview = event.progress.preview
            if preview is not None:
                buffer = io.BytesIO()
                preview.save(buffer, job.order.output_format.upper())
                size = f"{preview.width}x{preview.height}"
                found.append(
                    answers.partial_event(
                        job, buffer.getvalue(), event.preview_number - 1, event.index, size
                    )
                )
            if progress:
                found.append(answers.progress_event(job, event.progress, event.index))
        elif isinstance(event, Moved) and progress:
            found.append(answers.position_event(job, event.position))
        return found

    # --- jobs ----------------------------------------------------------------------------------

    async def job(self, request: Request, job: str) -> Response:
        """Where a job is; or give it up: at once if it waits, else before its next step."""
        found = await self._find(job, request.state.client)
        if request.method == "DELETE" and not found.ended:
            await asyncio.to_thread(self._service.cancel, found)
        return JSONResponse(answers.job_response(self._service, found))

    async def picture(self, job: str, number: str) -> Response:
        """One picture; whoever knows its address may have it."""
        found = await self._find(job, None)
        if not number.isdecimal() or int(number) >= len(found.pictures) or len(number) > 2:  # noqa: PLR2004
            raise HTTPException(404, "the job has no such picture")
        picture = found.pictures[int(number)]
        return Response(picture.data, media_type=MEDIA_TYPES[picture.output_format])

    async def _find(self, name: str, client: str | None) -> Job:
        found = await asyncio.to_thread(self._service.job, name, client)
        if found is None:
            raise HTTPException(404, "there is no such job, or it ended long ago")
        return found


async def _perhaps_elsewhere(
    elsewhere: bool,  # noqa: FBT001
    work: Callable[..., Any],
    *given: Any,
    **named: Any,
) -> Any:
    """Do some work, in another thread if it may block."""
    if elsewhere:
        return await asyncio.to_thread(work, *given, **named)
    return work(*given, **named)


def _read_json(data: bytes) -> Any:
    def refuse(name: str) -> float:
        raise ValueError(name)

    def number(text: str) -> float:
        value = float(text)
        return int(value) if value.is_integer() else value  # in JSON 5.0 is a whole number, too

    try:
        return json.loads(data.decode(), parse_constant=refuse, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is no JSON", seen=str(error)[:200]) from error


async def _read_form(request: Request) -> tuple[dict[str, str], list[bytes]]:
    """Return the fields of a form, and the pictures to edit."""
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=MAX_IMAGES + 1, max_fields=MAX_FIELDS
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError, AssertionError) as error:
        raise RequestError("the body is no multipart form", seen=str(error)[:200]) from error
    fields: dict[str, str] = {}
    files: list[bytes] = []
    try:
        for name, value in form.multi_items():
            if name == "mask":
                raise NoEffectError(
                    "mask has no effect: the models here edit by words alone", setting="mask"
                )
            if name in ("image", "image[]"):
                if not isinstance(value, UploadFile):
                    raise RequestError("image must be a file", seen=value[:80], setting="image")
                files.append(await value.read())
            elif isinstance(value, UploadFile):
                raise RequestError(f"unknown file {name!r}", allowed="image", setting=name)
            elif name in fields:
                raise RequestError(f"{name} is there twice", setting=name)
            else:
                fields[name] = value
    finally:
        await form.close()
    if not files:
        raise RequestError("image is missing", setting="image")
    return fields, files


def _idempotency(request: Request) -> str | None:
    name = request.headers.get("idempotency-key")
    if name is not None and not 0 < len(name) <= 256:  # noqa: PLR2004
        raise RequestError(
            "the Idempotency-Key cannot be used",
            seen=f"{len(name)} characters",
            allowed="1 to 256",
            setting="Idempotency-Key",
        )
    return name


# --- errors ------------------------------------------------------------------------------------


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, DanqingError)  # noqa: S101
    status, body, headers = answers.describe_error(error)
    return JSONResponse(body, status, headers)


async def _on_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)  # noqa: S101
    body = answers.error_body(error.status, error.message, error.code)
    return JSONResponse(body, error.status, {"connection": "close"})


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    codes = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}
    code = codes.get(error.status_code, "invalid_request")
    body = answers.error_body(error.status_code, error.detail, code)
    return JSONResponse(body, error.status_code, error.headers)


# --- the OpenAPI document ------------------------------------------------------------------------


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
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
    editing = {n: spec for n, spec in specs.items() if "image" not in spec.no_effect}
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
    codes = {"401": "No key, or a wrong one."}
    found: dict[str, Any] = {}
    if path == "/metrics":
        fine = {"text/plain": {"schema": {"type": "string"}}}
    elif path.startswith("/v1/images"):
        fine = {_JSON: {"schema": _PICTURES}, _STREAM: {"schema": _EVENT}}
        codes |= {
            "400": "The request cannot be.", "404": "No such model.", "408": "It came too slowly.",
            "409": "The Idempotency-Key stands for another request, or the job was cancelled.",
            "413": "It is too large.", "415": "It is of another kind.",
            "429": "Too much waits: try again after Retry-After seconds.",
            "500": "The picture broke.", "503": "The server is starting or being stopped.",
            "504": "It was not finished in time.", "507": "The device ran out of memory.",
        }  # fmt: skip
        found["202"] = {
            "description": "Accepted, with Prefer: respond-async.",
            "content": {_JSON: {"schema": {"type": "object"}}},
        }
    elif path == "/readyz":
        found["503"] = {"description": "Not yet, or no more.", "content": fine}
    elif "{" in path:
        codes["404"] = "There is none."
        if path.endswith("{number}"):
            raw = {"schema": {"type": "string", "format": "binary"}}
            fine = dict.fromkeys(MEDIA_TYPES.values(), raw)
    for status, meaning in codes.items():
        found[status] = {"description": meaning, "content": error}
    return {"200": {"description": "Done.", "content": fine}, **found}
