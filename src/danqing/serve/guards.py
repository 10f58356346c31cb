"""What stands before every request: keys, hosts, sizes, times, headers, and a line in the log."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote_to_bytes

from danqing.errors import RequestError
from danqing.files import expand
from danqing.serve.answers import error_body

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping
    from pathlib import Path

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("danqing.serve")

OPEN_PATHS = ("/healthz", "/readyz")
"""What needs no key, beside addresses of pictures, which nobody can guess."""
LOCAL_CLIENT = "local"
EDITS_PATH = "/v1/images/edits"
PAGE_PATH = "/page"
UPLOAD_PATH = f"{PAGE_PATH}/gradio_api/upload"
_FILE_PATHS = frozenset({EDITS_PATH, UPLOAD_PATH})
"""Where a body may carry images."""
_DRAIN_SECONDS = 3.0
_HOST = re.compile(
    r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z](?:[0-9A-Za-z._-]{0,252}[0-9A-Za-z])?)"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<host>[^/?#@\\]+)", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}
_QUIET = ("/healthz", "/readyz", "/metrics")
_CLIENT_FAULT = 400
_LOGGED = 500
"""Characters of a path in the log."""
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
        body_bytes: of a request that carries images.
        text_bytes: of any other request; no field of the API needs more.
        page_bytes: of what the page sends about itself, beside uploaded files.
        body_seconds: in which it must have come whole.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    hosts: frozenset[str] | None = None
    body_bytes: int = 64 << 20
    text_bytes: int = 1 << 20
    page_bytes: int = 256 << 10
    body_seconds: float = 60.0


def read_keys(place: Path) -> dict[str, str]:
    """Return the names of clients by their keys: a line each, `name key` or a key alone.

    Raises:
        RequestError: the file cannot be read, or a key is too short.
    """
    try:
        lines = expand(place).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("the key file cannot be read", seen=f"{place}: {error}") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or len(words[-1]) < MIN_KEY or not words[-1].isascii():  # noqa: PLR2004
            raise RequestError(
                "invalid API key in the key file",
                seen=f"{place}, line {number}",
                allowed=f"a key of at least {MIN_KEY} ASCII characters, optionally after a "
                "name; # begins a comment",
                hint='python -c "import secrets; print(secrets.token_urlsafe())" makes one',
            )
        keys[words[-1]] = words[0] if len(words) > 1 else f"key-{len(keys) + 1}"
    if not keys:
        raise RequestError("the key file has no key", seen=place)
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
    """A request that is not let in.

    Args:
        status: of the answer.
        message: for the client.
        code: of the error, for programs.
        setting: the header or parameter at fault.
        closes: the connection ends after the answer, since the rest of the body is not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        setting: str | None = None,
        closes: bool = True,
    ) -> None:
        """Keep the answer."""
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.setting, self.closes = setting, closes

    def body(self) -> dict[str, Any]:
        """Return the error in the shape of the API."""
        return error_body(self.status, self.message, self.code, self.setting)


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
        body = _Body(receive, self._rules, scope["path"])
        seen = _Seen(scope, send, body)
        try:
            self._let_in(scope, seen)
            body.check(seen.headers)
            await self._app(scope, body, seen.send)
        except RefusedError as error:
            await seen.refuse(error)
        except Exception:
            log.exception(
                "unhandled", extra={"row": {"request": seen.id, "path": scope["path"][:_LOGGED]}}
            )
            await seen.refuse(RefusedError(500, bug_message(seen.id), "server_error"))
        finally:
            self._note(scope, seen)

    def _let_in(self, scope: Scope, seen: _Seen) -> None:
        path, peer = scope["path"], (scope.get("client") or ("", 0))[0]
        _check_encoding(scope)
        if is_loopback(peer) and seen.headers.get("x-forwarded-proto") in _PORTS:
            scope["scheme"] = seen.headers["x-forwarded-proto"]  # a proxy here speaks TLS
        said = seen.headers.get("host", "")
        host = read_host(said, scope["scheme"])
        unknown = self._rules.hosts is not None and (
            host is None or host.name not in self._rules.hosts
        )
        if unknown or (said and host is None):
            # else a page elsewhere whose name leads here could use what is open to this machine
            raise RefusedError(421, f"this server is not called {said[:80]!r}", "wrong_host")
        if any(_read_origin(origin) != (scope["scheme"], host) for origin in seen.origins):
            raise RefusedError(403, "requests from other sites are refused", "cross_origin")
        client = _count_as(peer)
        if self._rules.keys:
            client = LOCAL_CLIENT
            if path not in OPEN_PATHS and not _is_picture(path):
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
            "request": seen.id, "method": scope["method"], "path": scope["path"][:_LOGGED],
            "status": status, "client": seen.client,
            "seconds": time.perf_counter() - seen.start, "bytes": seen.sent,
        }  # fmt: skip
        quiet = (
            not scope["path"].startswith("/v1/") and status < _CLIENT_FAULT
        )  # a page asks every few seconds
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"row": row})


class _Seen:
    """What is known of a request while it is answered; adds headers to the answer."""

    def __init__(self, scope: Scope, send: Send, body: _Body) -> None:
        self._send = send
        self._body = body
        self._closes = False
        self.headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.origins = [v.decode("latin-1") for name, v in scope["headers"] if name == b"origin"]
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
            given = {name.lower(): value for name, value in message.get("headers", [])}
            self._closes = given.get(b"connection") == b"close"
            more = {**_SECURITY, **self.extra, "x-request-id": self.id}
            message["headers"] = [
                *message.get("headers", []),
                *((k.encode(), v.encode()) for k, v in more.items() if k.encode() not in given),
            ]
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
            if self._closes and not message.get("more_body") and not self._body.whole:
                # closing while the client still sends resets the connection, and the client
                # may lose the answer: it gets the answer first, and the rest is thrown away
                await self._send({**message, "more_body": True})
                await self._body.drain()
                message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def refuse(self, error: RefusedError) -> None:
        """Answer with an error, if no answer has begun."""
        if self.status:
            return
        body = json.dumps(error.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        start: MutableMapping[str, Any] = {
            "type": "http.response.start", "status": error.status, "headers": headers,
        }  # fmt: skip
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})


class _Body:
    """Receives a body, as long as it is neither too large nor too slow."""

    def __init__(self, receive: Receive, rules: Rules, path: str) -> None:
        self._receive = receive
        self._rules = rules
        self._path = path
        self._bytes = 0
        self._most = rules.text_bytes
        self.whole = False
        self._until = asyncio.get_running_loop().time() + rules.body_seconds

    def check(self, headers: Mapping[str, str]) -> None:
        """Refuse a body that says that it is too large, before any of it is read."""
        kind = headers.get("content-type", "")
        if self._path in _FILE_PATHS and kind.lower().startswith("multipart/form-data"):
            self._most = self._rules.body_bytes
        elif self._path.startswith(PAGE_PATH):
            self._most = self._rules.page_bytes
        said = headers.get("content-length", "0")
        if said.isdigit() and (len(said) > 15 or int(said) > self._most):  # noqa: PLR2004
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"the body is larger than {self._most} bytes", "body_too_large")

    async def drain(self) -> None:
        """Throw away what a refused client still sends, for a while."""
        until = asyncio.get_running_loop().time() + _DRAIN_SECONDS
        while not self.whole and self._bytes < 2 * self._rules.body_bytes:
            left = until - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(self._receive(), max(left, 0.0))
            except asyncio.TimeoutError:
                return
            self._bytes += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)

    async def __call__(self) -> Message:
        """Return the next message."""
        if self.whole:
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
            self.whole = not message.get("more_body", False)
            if self._bytes > self._most:
                raise self._too_large()
        return message


class Host(NamedTuple):
    """What a client calls the server: a name in lower case, and a port."""

    name: str
    port: int


@lru_cache(maxsize=256)
def read_host(text: str, scheme: str) -> Host | None:
    """Return name and port of a Host header, the port of the scheme where there is none.

    None if it is not `name`, `name:port`, `[address]` or `[address]:port` to the last character.
    """
    match = _HOST.fullmatch(text)
    if match is None:
        return None
    port = int(match["port"] or _PORTS.get(scheme, 0))
    return Host(match["name"].lower(), port) if port <= 0xFFFF else None  # noqa: PLR2004


def _read_origin(text: str) -> tuple[str, Host | None]:
    """Return scheme and host of an Origin header; a host that nothing equals if it is malformed."""
    match = _ORIGIN.fullmatch(text)
    scheme = match["scheme"].lower() if match else ""
    host = read_host(match["host"], scheme) if match else None
    return scheme, host or Host("", -1)


def _check_encoding(scope: Scope) -> None:
    """Refuse a path or query that is not UTF-8; surrogates written as bytes are not."""
    for part in (scope.get("raw_path") or b"", scope.get("query_string") or b""):
        if b"%" in part:
            try:
                unquote_to_bytes(part).decode()
            except UnicodeDecodeError:
                message = "the address is not UTF-8"
                raise RefusedError(400, message, "invalid_address") from None


@lru_cache(maxsize=1024)
def _count_as(peer: str) -> str:
    """Return by which name a client without a key is counted: its address, or its IPv6 network.

    All of this machine are one; of IPv6 one household has 2^64 addresses.
    """
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return LOCAL_CLIENT
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if address.is_loopback:
        return LOCAL_CLIENT
    if address.version == 6:  # noqa: PLR2004
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


def bug_message(request: str) -> str:
    """Return what a client reads when danqing failed; the cause is in the log alone."""
    return f"the server failed; its log has the cause under {request}"


def _is_picture(path: str) -> bool:
    return path.startswith("/v1/jobs/") and "/pictures/" in path
