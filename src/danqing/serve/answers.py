"""What clients are told: pictures, events and errors in the shape of the images API."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from danqing.errors import (
    BrokenPictureError,
    BusyError,
    CancelledError,
    ClosingError,
    DanqingError,
    DeadlineError,
    DoesNotFitError,
    JournalBusyError,
    JournalError,
    JournalFullError,
    ModelNotFoundError,
    NoEffectError,
    RefusedPictureError,
    RequestError,
    UnknownSettingError,
)
from danqing.serve.privacy import public_message

if TYPE_CHECKING:
    from collections.abc import Mapping

    from danqing.generation import Progress
    from danqing.runner import Runner
    from danqing.serve.jobs import Job, Order, Painted
    from danqing.serve.service import Service

CODES: dict[type[DanqingError], str] = {
    BusyError: "rate_limit_exceeded",
    ClosingError: "server_not_ready",
    DeadlineError: "deadline_exceeded",
    CancelledError: "cancelled",
    DoesNotFitError: "out_of_memory",
    BrokenPictureError: "broken_picture",
    RefusedPictureError: "moderation_blocked",
    ModelNotFoundError: "model_not_found",
    NoEffectError: "no_effect",
    UnknownSettingError: "unknown_parameter",
    RequestError: "invalid_value",
    JournalFullError: "journal_full",
    JournalBusyError: "journal_busy",
    JournalError: "journal_failed",
}
_SERVER_FAULT = 500
_TOO_MANY = 429


def describe_error(error: DanqingError, about: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, body and headers for an error.

    Args:
        error: that ended a request or a job.
        about: id of the request or the job, under which the log has the cause.
    """
    code = next((code for kind, code in CODES.items() if isinstance(error, kind)), "server_error")
    setting = error.setting if isinstance(error, RequestError) else None
    status = error.http_status
    if setting == "Idempotency-Key":
        code, status = "idempotency_key_reused", 409
    headers = {}
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, (ClosingError, JournalBusyError)):
        headers["Retry-After"] = "2"
    elif status >= _SERVER_FAULT:
        headers["x-should-retry"] = "false"  # official clients obey: it would fail again
    return status, error_body(status, public_message(error, about), code, setting), headers


def error_body(status: int, message: str, code: str, setting: str | None = None) -> dict[str, Any]:
    """Return an error in the API's shape."""
    kind = "invalid_request_error"
    if status == _TOO_MANY:
        kind = "rate_limit_error"
    elif status >= _SERVER_FAULT:
        kind = "server_error"
    return {"error": {"message": message, "type": kind, "param": setting, "code": code}}


def usage(runner: Runner, job: Job) -> dict[str, Any]:
    """Count tokens as the model has them: of the prompt, and patches of latents.

    Counted once: a job that has ended holds its images to edit no longer.
    """
    if job.usage is None:
        job.usage = _count_tokens(runner, job.order)
    return job.usage


def _count_tokens(runner: Runner, order: Order) -> dict[str, Any]:
    text, images, painted = runner.tokens(order.request)
    painted *= order.request.num_images_per_prompt
    return {
        "input_tokens": text + images,
        "input_tokens_details": {"text_tokens": text, "image_tokens": images},
        "output_tokens": painted,
        "total_tokens": text + images + painted,
    }


def timing(job: Job) -> dict[str, float]:
    """Return seconds: waited, worked, and of each stage."""
    found: dict[str, float] = {}
    if job.started is not None:
        found["waited"] = round(job.started - job.accepted, 4)
        if job.finished is not None:
            found["worked"] = round(job.finished - job.started, 4)
    for picture in job.pictures:
        for stage in picture.record["stages"]:
            name = stage["name"]
            found[name] = round(found.get(name, 0.0) + float(stage["seconds"]), 4)
    return found


def address(job: Job, number: int) -> str:
    """Return where a picture can be fetched; whoever knows it may."""
    return f"/v1/jobs/{job.id}/pictures/{number}"


def images_response(service: Service, job: Job, *, base: str | None = None) -> dict[str, Any]:
    """Return a job's pictures.

    Args:
        service: that painted it.
        job: done.
        base: of addresses, if they are wanted in place of the pictures.
    """
    return {
        **_common(job, job.pictures[0]),
        "created": int(job.finished or job.accepted),
        "data": [
            {**_one(job, number, picture, base), "record": picture.record}
            for number, picture in enumerate(job.pictures)
        ],
        "usage": usage(service.models[job.order.model], job),
        "timing": timing(job),
        "job": job.id,
        "notes": list(job.order.notes),
    }


def _one(job: Job, number: int, picture: Painted, base: str | None) -> dict[str, Any]:
    if base is not None:
        return {"url": base + address(job, number)}
    return {"b64_json": base64.b64encode(picture.data).decode()}


def _common(job: Job, picture: Painted) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": job.order.output_format,
        "quality": "auto",
        "size": picture.size,
        "model": job.order.model,
    }


def job_response(service: Service, job: Job) -> dict[str, Any]:
    """Return where a job is, and what became of it."""
    found: dict[str, Any] = {
        "id": job.id,
        "object": "job",
        "status": job.state,
        "model": job.order.model,
        "created": int(job.accepted),
        "timing": timing(job),
    }
    if job.state == "queued":
        found["position"] = job.position
    if job.progress is not None and not job.ended:
        found["progress"] = _progress(job.progress)
    if job.state == "done" and job.order.model in service.models:
        found["result"] = images_response(service, job, base="")
    if job.error is not None:
        found |= describe_error(job.error, job.id)[1]
    return found


def _progress(progress: Progress) -> dict[str, Any]:
    return {
        "stage": progress.stage,
        "done": progress.done,
        "total": progress.total,
        "unit": progress.unit,
    }


# --- server-sent events --------------------------------------------------------------------------


def event(kind: str, body: Mapping[str, Any]) -> bytes:
    """Return one event as it is sent."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **body})}\n\n".encode()


def partial_event(job: Job, data: bytes, number: int, picture: int, size: str) -> bytes:
    """Return the event of a preview; `number` counts those of one picture from 0."""
    return event(
        f"{_kind(job)}.partial_image",
        {
            "b64_json": base64.b64encode(data).decode(),
            "partial_image_index": number,
            "created_at": int(job.accepted),
            "size": size,
            "quality": "auto",
            "background": "opaque",
            "output_format": job.order.output_format,
            "picture_index": picture,
        },
    )


def progress_event(job: Job, progress: Progress, picture: int) -> bytes:
    """Return the event of a step."""
    return event(f"{_kind(job)}.progress", {**_progress(progress), "picture_index": picture})


def position_event(job: Job, position: int) -> bytes:
    """Return the event of a move in the queue."""
    return event(f"{_kind(job)}.queued", {"position": position})


def completed_event(service: Service, job: Job, picture: Painted, number: int) -> bytes:
    """Return the event of a finished picture."""
    return event(
        f"{_kind(job)}.completed",
        {
            **_common(job, picture),
            "b64_json": base64.b64encode(picture.data).decode(),
            "created_at": int(job.accepted),
            "usage": usage(service.models[job.order.model], job),
            "timing": timing(job),
            "picture_index": number,
            "record": picture.record,
            "job": job.id,
        },
    )


def error_event(error: DanqingError, about: str) -> bytes:
    """Return the event that ends a stream that failed; `about` is the job's id."""
    return event("error", describe_error(error, about)[1])


def _kind(job: Job) -> str:
    return "image_edit" if job.order.edits else "image_generation"
