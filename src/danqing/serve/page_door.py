"""What stands between the guard and gradio: few of its addresses, and every session its client's.

A browser names its session itself, in `session_hash`. Gradio lets whoever knows that name read the
session's events and end it, so the name belongs to the client that used it first.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from danqing.serve.answers import error_body
from danqing.serve.guards import PAGE_PATH, RefusedError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from danqing.serve.intake import Intake
    from danqing.serve.uploads import Uploads

_API = "/gradio_api"
_GET = re.compile(
    r"|/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt"
    r"|/(?:static|assets|svelte)/.+"
    rf"|{_API}/(?:theme\.css|startup-events|app_id|upload_progress|queue/data)"
    rf"|{_API}/(?:heartbeat/|file=).+"
)
_POST = re.compile(rf"{_API}/(?:upload|queue/join|run/predict|cancel|reset|reset/)")
_SESSION = re.compile(r"[0-9A-Za-z_-]{1,64}")
_SESSIONS = 512
"""Of one client that are remembered; the one used longest ago is forgotten."""
_CLIENTS = 4096
_MAX_NESTED = 20_000
"""Objects and arrays of a body; the page sends about thirty, the rest may be in a prompt."""


class Door:
    """ASGI application around gradio's."""

    def __init__(self, page: ASGIApp, functions: int, intake: Intake, uploads: Uploads) -> None:
        """Keep what is behind it: gradio's application, and how many functions the page has."""
        self._functions = functions
        self._page = page
        self._intake = intake
        self._uploads = uploads
        self._owners: dict[str, str] = {}
        self._sessions: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let gradio do it."""
        if scope["type"] != "http":
            await self._page(scope, receive, send)
            return
        path, method = scope["path"].removeprefix(PAGE_PATH), scope["method"]
        client = scope["state"]["client"]
        known = _POST if method == "POST" else _GET if method in ("GET", "HEAD") else None
        if known is None or not known.fullmatch(path):
            raise HTTPException(404, "Not Found")
        request = Request(scope, receive)
        if path == f"{_API}/upload":
            await (await self._upload(request, client))(scope, receive, send)
        elif path == f"{_API}/upload_progress":
            done = Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")
            await done(scope, receive, send)
        else:
            if method == "POST":
                body = await request.body()
                self._own(_read_session(body, self._functions), client)
                receive = _replay(body, receive)
            elif path == f"{_API}/queue/data":
                asked = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])
                self._own(asked[-1] if len(asked) == 1 else "", client)
            elif path.startswith(f"{_API}/heartbeat/"):
                self._own(path.rpartition("/")[2], client)
            await self._page(scope, receive, send)

    def _own(self, session: str, client: str) -> None:
        """See that a session is this client's, or give it to it."""
        if not _SESSION.fullmatch(session):
            raise RefusedError(400, "invalid session name", "invalid_value", closes=False)
        if self._owners.setdefault(session, client) != client:
            raise RefusedError(403, "the session is of another client", "forbidden", closes=False)
        mine = self._sessions.setdefault(client, OrderedDict())
        mine[session] = None
        mine.move_to_end(session)
        self._sessions.move_to_end(client)
        if len(mine) > _SESSIONS:
            del self._owners[mine.popitem(last=False)[0]]
        if len(self._sessions) > _CLIENTS:
            for old in self._sessions.popitem(last=False)[1]:
                del self._owners[old]

    async def _upload(self, request: Request, client: str) -> Response:
        async with self._intake.turn(client):
            data = bytearray()
            async for piece in request.stream():
                data += piece
            kind = request.headers.get("content-type", "")
            return JSONResponse(await self._intake.run(self._uploads.take, data, kind, client))


def _read_session(body: bytes, functions: int) -> str:
    """Return the name of the session in a body that the page sends."""
    if body.count(b"[") + body.count(b"{") > _MAX_NESTED:
        raise RefusedError(400, "the body is nested too deeply", "invalid_value", closes=False)
    try:
        found = json.loads(body)
        if b"\\u" in body:
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair has no bytes
    except (ValueError, RecursionError):
        message = "the body is not valid JSON"
        raise RefusedError(400, message, "invalid_value", closes=False) from None
    if not isinstance(found, dict):
        return ""
    number = found.get("fn_index")
    if number is not None and not (isinstance(number, int) and 0 <= number < functions):
        raise RefusedError(400, "unknown function of the page", "invalid_value", closes=False)
    session = found.get("session_hash")
    return session if isinstance(session, str) else ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a channel that gives a body that was read once more."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


async def on_invalid(_: Request, __: Exception) -> Response:
    """Answer what gradio cannot read, without repeating it."""
    body = error_body(422, "the page cannot use this request", "invalid_value")
    return JSONResponse(body, 422)
