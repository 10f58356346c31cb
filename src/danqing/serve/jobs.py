"""A job: what a client asked for, what became of it, and who wants to know."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from danqing.errors import CancelledError, DanqingError, DeadlineError
from danqing.request import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from PIL.Image import Image

    from danqing.generation import Progress

State = Literal["queued", "running", "done", "failed", "cancelled", "given back"]
ENDED = ("done", "failed", "cancelled", "given back")
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
LATE_SECONDS = 2.0
"""After its deadline a job ends for its followers, even if the device or the disk hangs."""
_MAX_QUALITY = 100


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

    def without_images(self) -> Order:
        """Return it without the images to edit, which take far more memory than all the rest."""
        if self.request.image is None:
            return self
        return replace(self, request=self.request.replace(image=None))

    def images(self) -> list[bytes]:
        """Return the pictures to edit as PNG."""
        return [_png(one.image) for one in self.request.image or ()]


def read_order(text: str, images: Sequence[bytes]) -> Order:
    """Return an order from what `Order.as_json` and `Order.images` gave.

    Raises:
        Exception: of any kind, if text or images come from another version or are damaged.
    """
    from PIL import Image

    row = json.loads(text)
    if not isinstance(row["notes"], list):
        raise TypeError("invalid notes")
    pictures = [Image.open(io.BytesIO(data), formats=("PNG",)).convert("RGB") for data in images]
    request = Request(**row.pop("request"), image=pictures or None)
    order = Order(request=request, **{**row, "notes": tuple(row["notes"])})
    _check_types(order)
    return order


def _check_types(order: Order) -> None:
    """Raise TypeError if a field of an order that was read has a value of another type."""
    quality = order.quality
    valid = {
        "model": isinstance(order.model, str),
        "output_format": order.output_format in MEDIA_TYPES,
        "quality": quality is None or (type(quality) is int and 0 <= quality <= _MAX_QUALITY),
        "previews": type(order.previews) is int and order.previews >= 0,
        "edits": isinstance(order.edits, bool),
        "user": order.user is None or isinstance(order.user, str),
        "notes": all(isinstance(note, str) for note in order.notes),
    }
    if invalid := [name for name, is_valid in valid.items() if not is_valid]:
        raise TypeError(f"invalid {', '.join(invalid)}")


def digest_request(fields: Mapping[str, Any], order: Order) -> str:
    """Return a digest of what a request asks for, however its body was written.

    Args:
        fields: of the body, validated, without those that were left out.
        order: that the body became; its images count by their pixels.
    """
    images = [image.pixels_sha256 for image in order.request.image or ()]
    parts = [order.edits, fields, images]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
        digest: of what was asked (`digest_request`), to see that one name is one order; None in
            a job of a journal of version 1.
        sent_digest: of the bytes of the body; the only digest in a journal of version 1.
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
        usage: tokens, as a client is told them; None as long as nobody counted.
    """

    order: Order
    client: str
    id: str = field(default_factory=lambda: "job_" + secrets.token_urlsafe(18))
    idempotency: str | None = None
    digest: str | None = ""
    sent_digest: str = ""
    accepted: float = field(default_factory=lambda: time.time())  # noqa: PLW0108 - looked up late
    started: float | None = None
    finished: float | None = None
    detached: bool = False
    state: State = "queued"
    pictures: list[Painted] = field(default_factory=list)
    error: DanqingError | None = None
    progress: Progress | None = None
    position: int = 0
    expires: float | None = None
    usage: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Begin without anybody who follows it."""
        self._followers: list[_Follower] = []
        self._lock = threading.Lock()
        self._claimed = False
        self._accepted_at = time.monotonic() - max(0.0, time.time() - self.accepted)
        self.ended_at = time.monotonic() if self.ended else None
        self.given_up = threading.Event()

    @property
    def age(self) -> float:
        """Seconds since it was accepted; the clock of the machine may jump meanwhile."""
        return max(0.0, time.monotonic() - self._accepted_at)

    def now(self) -> float:
        """Return the seconds since 1970 by a clock that runs evenly since it was accepted."""
        return self.accepted + self.age

    def asks_the_same(self, digest: str, sent_digest: str) -> bool:
        """Say whether a request with these digests asks for this job."""
        if self.digest is None:
            return self.sent_digest == sent_digest
        return self.digest == digest

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self.state in ENDED

    @property
    def claimed(self) -> bool:
        """Whether a thread is ending it, or has ended it."""
        return self._claimed

    def claim(self) -> bool:
        """Reserve the right to end it; return False if another thread has it."""
        with self._lock:
            if self._claimed or self.ended:
                return False
            self._claimed = True
            return True

    def start(self) -> bool:
        """Note that a worker begins with it; return False if it has ended."""
        with self._lock:
            if self._claimed or self.ended:
                return False
            self.state, self.started = "running", self.now()
            return True

    @property
    def size_bytes(self) -> int:
        """Of the finished pictures."""
        return sum(len(one.data) for one in self.pictures)

    @property
    def followers(self) -> int:
        """How many wait for it."""
        return len(self._followers)

    def tell(self, event: Event) -> None:
        """Tell all who follow; from any thread. After the end nothing else is told."""
        with self._lock:
            if self.ended and not isinstance(event, Ended):
                return  # the deadline ended it while the device computed
            if isinstance(event, Finished):
                self.pictures.append(event.picture)
            elif isinstance(event, Stepped):
                self.progress = event.progress
            elif isinstance(event, Moved):
                self.position = event.position
            for one in self._followers:
                if one.all_of_it or isinstance(event, Ended):
                    with contextlib.suppress(RuntimeError):  # that follower's loop is closed
                        one.loop.call_soon_threadsafe(one.queue.put_nowait, event)

    async def follow(self, *, all_of_it: bool = True) -> AsyncIterator[Event]:
        """Yield what is there already and then what happens, until it has ended.

        It always ends: `LATE_SECONDS` after the deadline the follower ends the job itself.

        Args:
            all_of_it: or the end alone: each event wakes the loop's thread, beside the arithmetic.
        """
        loop = asyncio.get_running_loop()
        mine = _Follower(loop, asyncio.Queue(), all_of_it)
        with self._lock:
            known: list[Event] = [Finished(one, i) for i, one in enumerate(self.pictures)]
            if self.state == "queued":
                known.insert(0, Moved(self.position))
            over = self.ended
            self._followers.append(mine)
        timer = None
        if not over and self.expires is not None:
            # a thread that hangs (in a driver, in a write to disk) cannot tell anybody
            left = self.expires + LATE_SECONDS - time.monotonic()
            timer = loop.call_later(max(0.0, left), self.end_late)
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
            if timer is not None:
                timer.cancel()
            with self._lock:
                self._followers.remove(mine)

    def end(self, state: State, error: DanqingError | None = None) -> bool:
        """Set how it ended and tell all; return False if it had ended before."""
        with self._lock:
            if self.ended:
                return False
            self.state, self.error, self.finished = state, error, self.now()
            self.ended_at = time.monotonic()
            self.progress = None  # it may hold a preview
        self.tell(Ended())
        return True

    def end_late(self) -> bool:
        """End it as one that passed its deadline; return False if it had ended before."""
        return self.end("failed", late_error(self))


def late_error(job: Job) -> DanqingError:
    """Return the error of a job that passed its deadline."""
    return DeadlineError(
        "the images were not finished in time",
        seen=f"{job.age:.0f} s, waiting included",
        hint="use fewer steps, images or pixels, or ask again when the queue is shorter",
    )


def cancelled_error() -> DanqingError:
    """Return the error of a job that was cancelled."""
    return CancelledError("the job was cancelled")


def unknown_failure(error: BaseException | None = None) -> DanqingError:
    """Return the error of a job that failed in a way danqing does not know."""
    seen = None if error is None else f"{type(error).__name__}: {str(error)[:200]}"
    return DanqingError("this job failed in a way danqing does not know", seen=seen)
