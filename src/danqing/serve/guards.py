"""What stands before every request: keys, hosts, sizes, times, headers, and a line in the log."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from danqing.errors import RequestError
from danqing.serve.answers import error_body

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping
    from pathlib import Path

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("danqing.serve")

OPEN_PATHS = ("/healthz", "/readyz")
"""What needs no key, beside addresses of pictures, which nobody can guess."""
LOCAL_CLIENT = "local"
_QUIET = ("/healthz", "/readyz", "/metrics")
_CLIENT_FAULT = 400
_SECURITY = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is let in.

    Attributes:
        keys: name of each client by its key; empty if none is needed.
        hosts: names by which a browser may call the server; None for all.
        body_bytes: of a request.
        body_seconds: in which it must have come whole.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    hosts: frozenset[str] | None = None
    body_bytes: int = 64 << 20
    body_seconds: float = 60.0


def read_keys(place: Path) -> dict[str, str]:
    """Return the names of clients by their keys: a line each, `name key` or a key alone.

    Raises:
        RequestError: the file cannot be read, or a key is too short.
    """
    try:
        lines = place.expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("the file of keys cannot be read", seen=f"{place}: {error}") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or len(words[-1]) < MIN_KEY or not words[-1].isascii():  # noqa: PLR2004
            raise RequestError(
                "a line of the file of keys is no key",
                seen=f"{place}, line {number}",
                allowed=f"a key of at least {MIN_KEY} ASCII characters, a name before it if you "
                "like; # begins a remark",
                hint='python -c "import secrets; print(secrets.token_urlsafe())" makes one',
            )
        keys[words[-1]] = words[0] if len(words) > 1 else f"key-{len(keys) + 1}"
    if not keys:
        raise RequestError("the file of keys has none", seen=place)
    return keys


MIN_KEY = 16


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class RefusedError(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, message: str, code: str) -> None:
        """Keep what is answered."""
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Guard:
    """ASGI middleware: lets a request in or answers it, and logs what became of it."""

    def __init__(
        self, app: ASGIApp, rules: Rules, answered: Callable[[str, int], None] | None = None
    ) -> None:
        """Keep the rules; `answered` is told route and status of each request."""
        self._app = app
        self._rules = rules
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no websockets here
        seen = _Seen(scope, send)
        try:
            self._let_in(scope, seen)
            body = _Body(receive, self._rules)
            body.check(seen.headers)
            await self._app(scope, body, seen.send)
        except RefusedError as error:
            await seen.refuse(error)
        except Exception:
            log.exception("unhandled", extra={"row": {"request": seen.id, "path": scope["path"]}})
            await seen.refuse(RefusedError(500, "this is a bug in danqing", "server_error"))
        finally:
            self._note(scope, seen)

    def _let_in(self, scope: Scope, seen: _Seen) -> None:
        path = scope["path"]
        host = _host(seen.headers.get("host", ""))
        if self._rules.hosts is not None and host not in self._rules.hosts:
            # else a page elsewhere whose name leads here could use what is open to this machine
            raise RefusedError(421, f"this server is not called {host!r}", "wrong_host")
        origin = seen.headers.get("origin")
        if origin is not None and _host(origin.partition("://")[2]) != host:
            raise RefusedError(403, "requests from other sites are refused", "cross_origin")
        client = LOCAL_CLIENT
        if self._rules.keys and path not in OPEN_PATHS and not _is_picture(path):
            found = self._client(seen.headers.get("authorization", ""))
            if found is None:
                seen.extra["www-authenticate"] = 'Basic realm="danqing", charset="UTF-8"'
                raise RefusedError(401, "the API key is missing or wrong", "invalid_api_key")
            client = found
        scope.setdefault("state", {})["client"] = seen.client = client
        scope["state"]["request"] = seen.id

    def _client(self, authorization: str) -> str | None:
        """Return whose key this is; each is compared, so that time tells nothing."""
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":  # what a browser asks for: any name, the key as password
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                return None
        elif scheme.lower() != "bearer":
            return None
        found = None
        for key, name in self._rules.keys.items():
            if hmac.compare_digest(key.encode(), given.strip().encode()):
                found = name
        return found

    def _note(self, scope: Scope, seen: _Seen) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        if not scope["path"].startswith(("/v1/", *_QUIET)) and route != "other":
            route = "page"  # gradio's own routes
        status = seen.status or 499  # the client went away
        if self._answered is not None:
            self._answered(route, status)
        row = {
            "request": seen.id, "method": scope["method"], "path": scope["path"], "status": status,
            "client": seen.client, "seconds": time.perf_counter() - seen.start, "bytes": seen.sent,
        }  # fmt: skip
        quiet = (
            not scope["path"].startswith("/v1/") and status < _CLIENT_FAULT
        )  # a page asks every few seconds
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"row": row})


class _Seen:
    """What is known of a request while it is answered; adds headers to the answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self.headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.id = "req_" + secrets.token_hex(8)
        self.client = ""
        self.start = time.perf_counter()
        self.status = 0
        self.sent = 0
        self.extra: dict[str, str] = {}

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name.lower() for name, _ in message.get("headers", [])}
            more = {**_SECURITY, **self.extra, "x-request-id": self.id}
            message["headers"] = [
                *message.get("headers", []),
                *((k.encode(), v.encode()) for k, v in more.items() if k.encode() not in given),
            ]
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, error: RefusedError) -> None:
        """Answer with an error, if no answer has begun."""
        if self.status:
            return
        body = json.dumps(error_body(error.status, error.message, error.code)).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        start: MutableMapping[str, Any] = {
            "type": "http.response.start", "status": error.status, "headers": headers,
        }  # fmt: skip
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})


class _Body:
    """Receives a body, as long as it is neither too large nor too slow."""

    def __init__(self, receive: Receive, rules: Rules) -> None:
        self._receive = receive
        self._rules = rules
        self._bytes = 0
        self._whole = False
        self._until = asyncio.get_running_loop().time() + rules.body_seconds

    def check(self, headers: Mapping[str, str]) -> None:
        """Refuse a body that says that it is too large, before any of it is read."""
        said = headers.get("content-length", "0")
        if said.isdigit() and int(said) > self._rules.body_bytes:
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        most = self._rules.body_bytes
        return RefusedError(413, f"the body is larger than {most} bytes", "body_too_large")

    async def __call__(self) -> Message:
        """Return the next message."""
        if self._whole:
            return await self._receive()  # it went away, or nothing
        left = self._until - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.0))
        except asyncio.TimeoutError:
            seconds = self._rules.body_seconds
            why = f"the body did not come in {seconds:.0f} s"
            raise RefusedError(408, why, "too_slow") from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._bytes > self._rules.body_bytes:
                raise self._too_large()
        return message


def _host(text: str) -> str:
    """Return a host without its port."""
    if text.startswith("["):
        return text.partition("]")[0] + "]"
    return text.partition(":")[0].lower()


def _is_picture(path: str) -> bool:
    return path.startswith("/v1/jobs/") and "/pictures/" in path
