"""The HTTP side: routes, and the documents that describe them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import re
import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse as PlainJSONResponse
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from danqing.errors import CancelledError, DanqingError, DeadlineError, NoEffectError
from danqing.escaping import escape
from danqing.serve import answers
from danqing.serve.bodies import EditBody, GenerationBody, read_body, read_order
from danqing.serve.form_body import read_form
from danqing.serve.guards import EDITS_PATH, RefusedError, bug_message
from danqing.serve.intake import Intake
from danqing.serve.jobs import MEDIA_TYPES, Ended, Finished, Moved, Stepped, digest_request
from danqing.serve.json_body import read_object
from danqing.serve.limits import plan_order
from danqing.serve.metrics import MEDIA_TYPE
from danqing.serve.openapi import describe_api
from danqing.serve.sent_images import read_images
from danqing.version import __version__

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from danqing.references import Reference
    from danqing.runner import Runner
    from danqing.serve.bodies import Body
    from danqing.serve.jobs import Job
    from danqing.serve.metrics import Metrics
    from danqing.serve.service import Service

log = logging.getLogger("danqing.serve")

KEEP_ALIVE_SECONDS = 10.0
"""Between two signs of life of a stream that has nothing to say."""
_IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,256}")
_SERVER_FAULT = 500
_ASYNC = "respond-async"  # RFC 7240, 4.1
_JSON = "application/json"
_STREAM = "text/event-stream"


class JSONResponse(PlainJSONResponse):
    """An answer in JSON; a text that is not Unicode is escaped, never a failure."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        try:
            return super().render(content)
        except UnicodeEncodeError:
            return json.dumps(content).encode()


def make_app(service: Service, metrics: Metrics) -> FastAPI:
    """Return the application of a service."""
    app = FastAPI(
        title="danqing", version=__version__, docs_url=None, redoc_url=None,
        description="Images from open models: the images API, and jobs.",
    )  # fmt: skip
    app.state.intake = Intake()
    routes = _Routes(service, metrics, app.state.intake)
    app.get("/healthz", summary="Report that the process is up.")(routes.health)
    app.get("/readyz", summary="Report whether models are loaded and devices answer.")(routes.ready)
    app.get("/metrics", summary="Metrics for Prometheus.")(routes.figures)
    app.get("/v1/models", summary="List the models.")(routes.models)
    app.get("/v1/models/{model}", summary="Describe one model.")(routes.model)
    app.post("/v1/images/generations", summary="Make images from a prompt.")(routes.generations)
    app.post(EDITS_PATH, summary="Edit images.")(routes.edits)
    app.api_route("/v1/jobs/{job}", methods=["GET", "DELETE"], summary="Get or cancel a job.")(
        routes.job
    )
    app.get("/v1/jobs/{job}/pictures/{number}", summary="Get one image of a job.")(routes.picture)
    app.add_exception_handler(DanqingError, _on_error)
    app.add_exception_handler(RefusedError, _on_refused)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, on_bug)
    app.openapi = lambda: describe_api(app, service)  # type: ignore[method-assign]
    return app


class _Routes:
    def __init__(self, service: Service, metrics: Metrics, intake: Intake) -> None:
        self._service = service
        self._metrics = metrics
        self._intake = intake

    # --- the server ----------------------------------------------------------------------------

    async def health(self) -> Response:
        """Report that the process is up."""
        return JSONResponse({"status": "up"})

    async def ready(self) -> Response:
        """Report whether models are loaded and devices answer."""
        ready = await asyncio.to_thread(self._service.answers)
        body = {
            "status": "ready" if ready else self._service.state,
            "queue": self._service.depth,
            "running": self._service.running,
        }
        return JSONResponse(body, 200 if ready else 503)

    async def figures(self) -> Response:
        """Return metrics for Prometheus."""
        text = await asyncio.to_thread(self._metrics.text)
        return Response(text, media_type=MEDIA_TYPE)

    async def models(self) -> Response:
        """List the models."""
        rows = [self._describe(name) for name in self._service.specs]
        return JSONResponse({"object": "list", "data": rows})

    async def model(self, model: str) -> Response:
        """Describe one model."""
        name, _ = self._service.runner(model)
        return JSONResponse(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        _, runner = self._service.runner(name)
        spec, plan, checker = runner.spec, runner.plan, self._service.checker
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "danqing",
            "title": spec.title,
            "defaults": dict(spec.defaults),
            "no_effect": dict(spec.no_effect),
            "edits": "image" in spec.takes,
            "max_side": self._service.limits.side,
            "safety_checker": "off" if checker is None else checker.name,
            "device": plan.device,
            "dtype": plan.dtype,
            "placement": plan.placement,
        }

    # --- pictures ------------------------------------------------------------------------------

    async def generations(self, request: Request) -> Response:
        """Make images from a prompt."""
        self._want(request, _JSON)
        data = await request.body()
        body = read_body(GenerationBody, read_object(data, GenerationBody), from_json=True)
        return await self._answer(request, body, [], hashlib.sha256(data).hexdigest())

    async def edits(self, request: Request) -> Response:
        """Edit images."""
        self._want(request, "multipart/form-data")
        kind = request.headers["content-type"]
        async with self._intake.turn(request.state.client):
            data = bytearray()
            async for piece in request.stream():
                data += piece
            body, images, digest = await self._intake.run(self._read_edit, data, kind)
        self._intake.hold(request.state.client, images)
        return await self._answer(request, body, images, digest, edits=True)

    def _read_edit(self, data: bytearray, kind: str) -> tuple[Body, list[Reference], str]:
        """Return what a form asks for, its images decoded, and its digest."""
        fields, files = read_form(data, kind, EditBody)
        body = read_body(EditBody, fields, from_json=False)
        self._runner(body.model, edits=True)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        for file in files:
            digest.update(file)
        return body, read_images(files), digest.hexdigest()

    def _runner(self, model: str | None, *, edits: bool) -> tuple[str, Runner]:
        """Return the model that is asked for, if it does what is asked."""
        name, runner = self._service.runner(model)
        if edits and "image" not in runner.spec.takes:
            reason = runner.spec.no_effect.get("image")
            raise NoEffectError(f"{name} does not edit", seen=reason, setting="image")
        return name, runner

    @staticmethod
    def _want(request: Request, kind: str) -> None:
        """Refuse other bodies: a form is what pages of other sites could send unasked."""
        said = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if said != kind:
            named = escape(said[:80], one_line=True) or "unnamed"
            raise HTTPException(415, f"the body must be {kind}, not {named}")

    async def _answer(
        self,
        request: Request,
        body: Body,
        images: list[Reference],
        digest: str,
        *,
        edits: bool = False,
    ) -> Response:
        """Accept an order and answer as the client wishes."""
        service = self._service
        expires = time.monotonic() + service.limits.deadline
        idempotency = _idempotency(request)
        name, runner = self._runner(body.model, edits=edits)
        order = read_order(body, name, images, most=service.limits.side, edits=edits)
        later = _ASYNC in request.headers.get("prefer", "")
        # another thread costs a third of a millisecond each time: only for what may take longer
        order = await _perhaps_elsewhere(bool(images), plan_order, runner, order, service.limits)
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
        if edits and not job.ended:
            answers.usage(runner, job)
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
                yield answers.error_event(job.error, job.id)
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
        """Get a job, or cancel it: at once if it waits, else before its next step."""
        found = await self._find(job, request.state.client)
        if request.method == "DELETE" and not found.ended:
            await asyncio.to_thread(self._service.cancel, found)
        return JSONResponse(answers.job_response(self._service, found))

    async def picture(self, job: str, number: str) -> Response:
        """Get one image; its address is the only key to it."""
        found = await self._find(job, None)
        # few digits first: a long number takes time, or cannot be read at all
        short = len(number) <= 2 and number.isascii() and number.isdecimal()  # noqa: PLR2004
        if not short or int(number) >= len(found.pictures):
            raise HTTPException(404, "image not found")
        picture = found.pictures[int(number)]
        return Response(picture.data, media_type=MEDIA_TYPES[picture.output_format])

    async def _find(self, name: str, client: str | None) -> Job:
        found = await asyncio.to_thread(self._service.job, name, client)
        if found is None:
            raise HTTPException(404, "job not found, or it ended long ago")
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


def _idempotency(request: Request) -> str | None:
    name = request.headers.get("idempotency-key")
    if name is not None and not _IDEMPOTENCY_KEY.fullmatch(name):
        message = (
            "invalid Idempotency-Key\n"
            f"  seen: {len(name)} characters\n"
            "  allowed: 1 to 256 printable ASCII characters"
        )
        raise RefusedError(400, message, "invalid_value", setting="Idempotency-Key", closes=False)
    return name


# --- errors ------------------------------------------------------------------------------------


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DanqingError)  # noqa: S101
    about = request.scope.get("state", {}).get("request", "")
    status, body, headers = answers.describe_error(error, about)
    if status >= _SERVER_FAULT:
        row = {"request": about, "error": type(error).__name__, "what": str(error)}
        log.warning("failed", extra={"row": row})
    return JSONResponse(body, status, headers)


async def _on_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)  # noqa: S101
    headers = {"connection": "close"} if error.closes else None
    return JSONResponse(error.body(), error.status, headers)


async def _on_disconnect(_: Request, error: Exception) -> Response:
    assert isinstance(error, ClientDisconnect)  # noqa: S101
    return Response(status_code=400)  # nobody reads it


async def on_bug(request: Request, _: Exception) -> Response:
    """Answer a failure that danqing does not know; `Guard` writes its cause to the log."""
    about = request.scope.get("state", {}).get("request", "")
    return JSONResponse(answers.error_body(500, bug_message(about), "server_error"), 500)


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    codes = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}
    code = codes.get(error.status_code, "invalid_request")
    body = answers.error_body(error.status_code, error.detail, code)
    return JSONResponse(body, error.status_code, error.headers)
