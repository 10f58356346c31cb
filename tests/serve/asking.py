"""Ask the application in this process, without a socket, and hold a journal's disk up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import httpx

from danqing.serve.app import make_app
from danqing.serve.guards import Guard, Rules
from danqing.serve.journal import Journal
from danqing.serve.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from danqing.serve.service import Service

BODY: dict[str, Any] = {"prompt": "x", "size": "64x64", "seed": 1}
GENERATIONS = "/v1/images/generations"
UNANSWERED = 0
"""Status of a request that was not answered in the time its test gives it."""


@contextlib.asynccontextmanager
async def connected(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    guard = Guard(make_app(service, Metrics()), Rules())
    transport = httpx.ASGITransport(guard)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def ask(
    client: httpx.AsyncClient, key: str | None = None, seconds: float = 10.0, **body: Any
) -> httpx.Response:
    """Send a request; a response of status UNANSWERED if none came in time."""
    headers = {} if key is None else {"idempotency-key": key}
    posting = client.post(GENERATIONS, json={**BODY, **body}, headers=headers)
    try:
        return await asyncio.wait_for(posting, seconds)
    except asyncio.TimeoutError:
        response = httpx.Response(200, json={})
        response.status_code = UNANSWERED
        return response


class SlowJournal(Journal):
    """A journal whose disk hangs at the operations named in `slow`, until `gate` is set."""

    gate: threading.Event
    reached: threading.Event
    slow: frozenset[str] = frozenset()

    def hang(self, *operations: str) -> None:
        self.gate, self.reached = threading.Event(), threading.Event()
        self.slow = frozenset(operations)

    def _pass(self, operation: str) -> None:
        if operation in self.slow:
            self.reached.set()
            assert self.gate.wait(30)

    def accept(self, job: Any) -> None:
        self._pass("accept")
        super().accept(job)

    def end(self, *given: Any, **named: Any) -> None:
        self._pass("end")
        super().end(*given, **named)

    def by_idempotency(self, client: str, name: str) -> Any:
        self._pass("by_idempotency")
        return super().by_idempotency(client, name)
