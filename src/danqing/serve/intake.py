"""Bound the memory of uploads: how many are read at once, and the pixels that jobs hold.

Parsing and decoding run in one thread of their own, so that neither the event loop nor the threads
that answer other requests wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from danqing.errors import BusyError
from danqing.quantities import size as in_words

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from danqing.references import Reference

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The most memory that uploads may take.

    Attributes:
        uploads: bodies with images that are read and decoded at the same time.
        client_uploads: of one client.
        held_bytes: decoded images of jobs that have not ended.
        client_held_bytes: of one client.
        patience: seconds that an upload waits for its turn.
    """

    uploads: int = 2
    client_uploads: int = 1
    held_bytes: int = 256 << 20
    client_held_bytes: int = 192 << 20
    patience: float = 6.0


class Intake:
    """Admits uploads in the order of their arrival."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        """Begin with nothing held."""
        self._bounds = bounds or Bounds()
        self._thread = ThreadPoolExecutor(1, "danqing-intake")
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()
        self._reading: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextlib.asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait until one more upload of this client may be read.

        Raises:
            BusyError: other uploads took too long.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((client, turn))
        self._admit()
        try:
            await asyncio.wait_for(asyncio.shield(turn), self._bounds.patience)
        except asyncio.TimeoutError:
            self._give_up(client, turn)
            raise BusyError(
                "too many images are being uploaded",
                allowed=f"{self._bounds.uploads} uploads at once, "
                f"{self._bounds.client_uploads} of one client",
                retry_after=5,
            ) from None
        except BaseException:
            self._give_up(client, turn)
            raise
        try:
            yield
        finally:
            self._release(client)

    def _give_up(self, client: str, turn: asyncio.Future[None]) -> None:
        """Leave the queue, or give the turn back where it came at the last moment."""
        if turn.done():
            self._release(client)
        else:
            self._waiting.remove((client, turn))
            turn.cancel()

    def _release(self, client: str) -> None:
        self._reading[client] -= 1
        if not self._reading[client]:
            del self._reading[client]
        self._admit()

    def _admit(self) -> None:
        """Give turns, passing over clients that have theirs already."""
        for row in list(self._waiting):
            if self._reading.total() >= self._bounds.uploads:
                return
            client, turn = row
            if self._reading[client] < self._bounds.client_uploads:
                self._waiting.remove(row)
                self._reading[client] += 1
                turn.set_result(None)

    async def run(self, work: Callable[_P, _T], *given: _P.args, **named: _P.kwargs) -> _T:
        """Run parsing or decoding in the thread for it, one after the other."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: work(*given, **named))

    def hold(self, client: str, images: Sequence[Reference]) -> None:
        """Count decoded images until they are dropped.

        Raises:
            BusyError: this client, or all together, hold too much.
        """
        count = sum(image.width * image.height * 3 for image in images)
        most = min(self._bounds.client_held_bytes, self._bounds.held_bytes)
        with self._lock:
            own, total = self._held[client] + count, self._held.total() + count
            if own > most or total > self._bounds.held_bytes:
                if not self._held[client]:
                    del self._held[client]
                raise BusyError(
                    "images of unfinished jobs take too much memory",
                    seen=in_words(own if own > most else total),
                    allowed=f"{in_words(most)} of one client, "
                    f"{in_words(self._bounds.held_bytes)} in all, decoded",
                    retry_after=5,
                )
            self._held[client] = own
        for image in images:
            size = image.width * image.height * 3
            weakref.finalize(image, self._drop, client, size).atexit = False

    def _drop(self, client: str, count: int) -> None:
        with self._lock:
            self._held[client] -= count
            if self._held[client] <= 0:
                del self._held[client]
