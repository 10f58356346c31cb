"""uvicorn under danqing's rules: models first, a word when ready, and an orderly end."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from danqing.errors import RequestError
from danqing.serve.answers import error_body
from danqing.serve.app import make_app
from danqing.serve.guards import Guard, Rules
from danqing.serve.metrics import Metrics

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from types import FrameType

    from danqing.generation import Progress
    from danqing.serve.service import Service

HEADER_SECONDS = 20.0
"""In which the first line and the headers of a request must have come."""
BACKLOG = 2048
_READ_BYTES = 64 << 10
"""Of a connection at once: what is parsed before others have their turn."""
_HEADER_BYTES = 32 << 10
_HEADER_LINES = 200
_FREE_PIECES = 1024
_PIECE_BYTES = 64
"""Average size of the pieces of a body, beyond the free ones: to parse a chunk of one byte takes
as long as one of many."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = 8000


@dataclass(kw_only=True)
class Server:
    """A service behind HTTP.

    Attributes:
        service: that paints.
        address: where it listens.
        rules: who is let in.
        metrics: that are counted.
        page: puts a page for people on the application, if there is to be one.
    """

    service: Service
    address: Address
    rules: Rules
    metrics: Metrics = field(default_factory=Metrics)
    page: Callable[[Any, Service], Any] | None = None

    def run(
        self,
        *,
        on_ready: Callable[[str], None],
        on_progress: Callable[[str, Progress], None],
    ) -> None:
        """Serve until a signal ends it; the address answers while the models are loaded.

        Args:
            on_ready: told the address when all models are loaded.
            on_progress: told of loading.

        Raises:
            RequestError: the address cannot be used.
            danqing.errors.DanqingError: a model cannot be loaded.
        """
        listener = _listen(self.address)
        port = listener.getsockname()[1]
        self.metrics.watch(self.service.gauges)
        self.service.metrics = self.metrics
        app: Any = make_app(self.service, self.metrics)
        if self.page is not None:
            app = self.page(app, self.service)
        config = uvicorn.Config(
            Guard(app, self.rules, self.metrics.answered),
            http=_Protocol, ws="none", lifespan="on", access_log=False, log_config=None,
            server_header=False, date_header=True, timeout_keep_alive=30, backlog=BACKLOG,
            # no X-Forwarded-For: clients could choose by which name they are counted
            proxy_headers=False, h11_max_incomplete_event_size=_HEADER_BYTES,
        )  # fmt: skip
        server = _Uvicorn(config, self.service)
        failed: list[BaseException] = []

        def load() -> None:
            try:
                self.service.load(on_progress)
                host = self.address.host
                on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            except BaseException as error:  # noqa: BLE001 - told below, in the thread that began it
                failed.append(error)
                server.should_exit = True

        loading = threading.Thread(target=load, name="danqing-load", daemon=True)
        loading.start()
        try:
            server.run(sockets=[listener])
        finally:
            loading.join()
            self.service.close()
            listener.close()
        if failed:
            raise failed[0]


class _Uvicorn(uvicorn.Server):
    """Tells the service at once when a signal comes, so that what waits is given back."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second Ctrl-C ends at once."""
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # or it is raised again at the end: this is no failure
        threading.Thread(target=self._service.end_work, daemon=True).start()


class _Connection(h11.Connection):
    """Refuses a body in pieces so small that parsing them would hold up everybody."""

    _pieces = 0
    _bytes = 0

    def next_event(self) -> Any:
        """Return the next event of the request."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._pieces += 1
            self._bytes += len(event.data)
            if self._pieces > _FREE_PIECES + self._bytes // _PIECE_BYTES:
                raise h11.RemoteProtocolError("the pieces of the body are too small")
        elif isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
        return event


class _Protocol(H11Protocol):
    """HTTP/1.1 with bounds: headers in seconds and lines, bodies in the number of their pieces."""

    _patience: asyncio.TimerHandle | None = None
    _lines = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to count."""
        super().connection_made(transport)
        # of asyncio's transports; 256 KiB of tiny chunks would be parsed in one go
        if hasattr(transport, "max_size"):
            transport.max_size = _READ_BYTES
        self.conn = _Connection(h11.SERVER, _HEADER_BYTES)
        self._count()

    def data_received(self, data: bytes) -> None:
        """Count while headers are what is being received."""
        if self.conn.their_state is h11.IDLE:
            end = data.find(b"\r\n\r\n")
            self._lines += data.count(b"\n", 0, len(data) if end < 0 else end)
            if self._lines > _HEADER_LINES:
                self._refuse(431, "the request has too many headers", "headers_too_large")
                return
            if end >= 0:
                self._lines = 0
        super().data_received(data)
        self._count()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the shape of every other answer."""
        self._refuse(400, msg.rstrip("."), "invalid_request")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without the application, unless it answers already, and close."""
        if self.transport.is_closing():
            return
        if self._before_request() or not self.cycle.response_started:
            body = json.dumps(error_body(status, message, code))
            self.transport.write(
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
                f"connection: close\r\n\r\n{body}".encode()
            )
        self.transport.close()

    def _count(self) -> None:
        if not self._before_request():
            self._stop()
        elif self._patience is None:
            self._patience = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _before_request(self) -> bool:
        cycle: Any = self.cycle
        return cycle is None or cycle.response_complete

    def _give_up(self) -> None:
        self._patience = None
        if self._before_request() and not self.transport.is_closing():
            self.transport.close()

    def _stop(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to count."""
        self._stop()
        super().connection_lost(exc)


def _listen(address: Address) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        # asyncio lets small packets go at once (TCP_NODELAY) only where it is told that this is
        # TCP; else an answer's end waits 40 ms until the client acknowledges its beginning
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        raise RequestError(
            "cannot listen at this address",
            seen=f"{address.host}:{address.port}: {error}",
            hint="choose another --port, or 0 for a free one",
        ) from error
    return listener
