"""A job: what a client asked for, what became of it, and who wants to know."""

from __future__ import annotations

import asyncio
import io
import json
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from danqing.request import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from PIL.Image import Image

    from danqing.errors import DanqingError
    from danqing.request import Progress

State = Literal["queued", "running", "done", "failed", "cancelled", "given back"]
ENDED = ("done", "failed", "cancelled", "given back")
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be painted.

    Attributes:
        model: the model's name.
        request: resolved, its seed known: painted again it is the same picture.
        output_format: of the files.
        quality: 0 to 100, of JPEG and WebP; None for the usual.
        previews: of each picture.
        edits: it began with pictures.
        user: whom the client asks for, in its own words.
        notes: what the client should know.
    """

    model: str
    request: Request
    output_format: str = "png"
    quality: int | None = None
    previews: int = 0
    edits: bool = False
    user: str | None = None
    notes: tuple[str, ...] = ()

    def as_json(self) -> str:
        """Return it without the pixels of the pictures to edit."""
        asked = self.request.model_dump(exclude={"image"})
        rest = {name: value for name, value in vars(self).items() if name != "request"}
        return json.dumps({**rest, "request": asked})

    def images(self) -> list[bytes]:
        """Return the pictures to edit as PNG."""
        return [_png(one.image) for one in self.request.image or ()]


def read_order(text: str, images: Sequence[bytes]) -> Order:
    """Return an order from what `Order.as_json` and `Order.images` gave."""
    from PIL import Image

    row = json.loads(text)
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
    request = Request(**row.pop("request"), image=pictures or None)
    return Order(request=request, **{**row, "notes": tuple(row["notes"])})


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Painted:
    """One finished picture, as the file that is handed out, with its record."""

    data: bytes
    output_format: str
    record: Mapping[str, Any]

    @property
    def size(self) -> str:
        """Width and height: `512x768`."""
        picture = self.record["picture"]
        return f"{picture['width']}x{picture['height']}"


@dataclass(frozen=True)
class Moved:
    """Its place in the queue is another: 0 is the next."""

    position: int


@dataclass(frozen=True)
class Stepped:
    """The worker reports progress of one picture."""

    progress: Progress
    index: int
    preview_number: int = 0


@dataclass(frozen=True)
class Finished:
    """One of its pictures is there."""

    picture: Painted
    index: int


@dataclass(frozen=True)
class Ended:
    """Nothing follows."""


Event: TypeAlias = "Moved | Stepped | Finished | Ended"


@dataclass(frozen=True, eq=False)
class _Follower:
    """Where to tell what happens."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Event]
    all_of_it: bool


@dataclass(eq=False, kw_only=True)
class Job:
    """One order on its way.

    Attributes:
        order: what is asked.
        client: whose it is; limits are counted by it.
        id: what clients name it by; hard to guess.
        idempotency: the client's own name of it, if it gave one.
        digest: of what the client sent, to see that one name is one order.
        accepted: seconds since 1970.
        started: when a worker took it, or None.
        finished: when it ended, or None.
        detached: it goes on when nobody follows it.
        state: where it is.
        pictures: finished so far.
        error: why it failed.
        progress: the last one reported.
        position: in the queue.
        expires: `time.monotonic` after which it is given up, or None.
    """

    order: Order
    client: str
    id: str = field(default_factory=lambda: "job_" + secrets.token_urlsafe(18))
    idempotency: str | None = None
    digest: str = ""
    accepted: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    detached: bool = False
    state: State = "queued"
    pictures: list[Painted] = field(default_factory=list)
    error: DanqingError | None = None
    progress: Progress | None = None
    position: int = 0
    expires: float | None = None

    def __post_init__(self) -> None:
        """Begin without anybody who follows it."""
        self._followers: list[_Follower] = []
        self._lock = threading.Lock()
        self.given_up = threading.Event()

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self.state in ENDED

    @property
    def size_bytes(self) -> int:
        """Of the finished pictures."""
        return sum(len(one.data) for one in self.pictures)

    @property
    def followers(self) -> int:
        """How many wait for it."""
        return len(self._followers)

    def tell(self, event: Event) -> None:
        """Tell all who follow; from any thread."""
        with self._lock:
            if isinstance(event, Finished):
                self.pictures.append(event.picture)
            elif isinstance(event, Stepped):
                self.progress = event.progress
            elif isinstance(event, Moved):
                self.position = event.position
            for one in self._followers:
                if (one.all_of_it or isinstance(event, Ended)) and not one.loop.is_closed():
                    one.loop.call_soon_threadsafe(one.queue.put_nowait, event)

    async def follow(self, *, all_of_it: bool = True) -> AsyncIterator[Event]:
        """Yield what is there already and then what happens, until it has ended.

        Args:
            all_of_it: or the end alone: each event wakes the loop's thread, beside the arithmetic.
        """
        mine = _Follower(asyncio.get_running_loop(), asyncio.Queue(), all_of_it)
        with self._lock:
            known: list[Event] = [Finished(one, i) for i, one in enumerate(self.pictures)]
            if self.state == "queued":
                known.insert(0, Moved(self.position))
            over = self.ended
            self._followers.append(mine)
        try:
            for event in known:
                yield event
            while not over:
                event = await mine.queue.get()
                if isinstance(event, Ended):
                    break
                yield event
            yield Ended()
        finally:
            with self._lock:
                self._followers.remove(mine)

    def end(self, state: State, error: DanqingError | None = None) -> bool:
        """Set how it ended and tell all; return False if it had ended before."""
        with self._lock:
            if self.ended:
                return False
            self.state, self.error, self.finished = state, error, time.time()
        self.tell(Ended())
        return True
