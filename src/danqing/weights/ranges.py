"""Byte ranges of files read by background threads, past the page cache where the disk allows it.

A network that is streamed is read once for every step. Through the page cache that would push out
whatever else lies in memory, and new pages are dear: on a virtual machine cold buffered reads gave
0.5 GB/s where direct ones gave 1.1 to 2.7 (decision 0013). So a range is read straight into memory
that is used again and again.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from danqing.errors import CheckpointDamagedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    import torch

    from danqing.weights.tensor_file import Identity

BLOCK = 4096
"""Bytes; places in the file, in memory, and lengths are multiples of it in direct reads."""
GAP = 1 << 20
"""Bytes that are rather read along than left out."""
CHUNK = 32 << 20
"""Bytes of one read."""
THREADS = 3


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `stop` of a file, as it was when its header was read."""

    path: Path
    identity: Identity
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where spans lie in memory after they were read together.

    Attributes:
        reads: span to read, widened to blocks, and its place in memory.
        places: of each span asked for, its first byte in memory.
        size: bytes in all, a multiple of `BLOCK`.
    """

    reads: tuple[tuple[Span, int], ...]
    places: tuple[int, ...]
    size: int


def lay_out(spans: Sequence[Span]) -> Layout:
    """Merge spans that lie close together in a file, and give each read a place in memory.

    A hub's files are sorted by name: the tensors of a block lie in several places, not in order.
    """
    order = sorted(range(len(spans)), key=lambda i: (str(spans[i].path), spans[i].start))
    reads: list[tuple[Span, int]] = []
    places = [0] * len(spans)
    size = 0
    for index in order:
        span = spans[index]
        first, last = span.start // BLOCK * BLOCK, -(-span.stop // BLOCK) * BLOCK
        if reads and reads[-1][0].path == span.path and first <= reads[-1][0].stop + GAP:
            before, place = reads[-1]
            last = max(last, before.stop)
            reads[-1] = (Span(span.path, span.identity, before.start, last), place)
            size = place + last - before.start
        else:
            reads.append((Span(span.path, span.identity, first, last), size))
            size += last - first
        widened, place = reads[-1]
        places[index] = place + span.start - widened.start
    return Layout(tuple(reads), tuple(places), size)


class Reading:
    """Reads under way; `wait` returns when the bytes are there."""

    def __init__(self, futures: Iterable[Future[None]]) -> None:
        """Keep what is waited for."""
        self._futures = list(futures)

    def wait(self) -> None:
        """Wait for all of it.

        Raises:
            CheckpointDamagedError: a file became shorter, was written to, or cannot be read.
        """
        for future in self._futures:
            future.result()

    @property
    def done(self) -> bool:
        """Whether nothing is left to wait for."""
        return all(future.done() for future in self._futures)


class RangeReader:
    """Reads layouts into memory; each file is opened once, and watched for changes."""

    def __init__(self, *, direct: bool, threads: int = THREADS) -> None:
        """Start no thread before the first read.

        Args:
            direct: past the page cache, where the file system has such reads.
            threads: that read at the same time.
        """
        self.direct = direct
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="danqing-read")
        self._files: dict[Path, _File] = {}

    def start(self, layout: Layout, memory: memoryview) -> Reading:
        """Begin to read a layout into memory that begins at a multiple of `BLOCK`."""
        futures = []
        for span, place in layout.reads:
            file = self._file(span)
            for start in range(span.start, span.stop, CHUNK):
                stop = min(start + CHUNK, span.stop)
                where = memory[place + start - span.start : place + stop - span.start]
                futures.append(self._pool.submit(file.read, start, where))
        return Reading(futures)

    def close(self) -> None:
        """Stop the threads and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, span: Span) -> _File:
        if span.path not in self._files:
            self._files[span.path] = _File(span.path, span.identity, direct=self.direct)
        return self._files[span.path]


class _File:
    """One open file; what was read is only given out if the file is still the one it was."""

    def __init__(self, path: Path, identity: Identity, *, direct: bool) -> None:
        self._path = path
        self._identity = identity
        try:
            # without O_NONBLOCK, opening a named pipe put in the file's place would block
            self._plain = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from error
        self._direct: int | None = None
        if direct and hasattr(os, "O_DIRECT"):
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_DIRECT)
            except OSError:
                self._direct = None  # a file system without direct reads: through its cache
        self._check()

    def read(self, start: int, memory: memoryview) -> None:
        """Fill memory from `start`; beyond the end of the file it stays as it is."""
        wanted = min(len(memory), self._identity.size - start)
        done = 0
        while done < wanted:
            count = self._read_some(start + done, memory[done:])
            if count == 0:
                raise CheckpointDamagedError(
                    "a weights file became shorter while it was read",
                    seen=f"{self._path}: nothing at byte {start + done}",
                    allowed=f"{self._identity.size} bytes, as when it was opened",
                )
            done += count
        self._check()

    def _read_some(self, start: int, memory: memoryview) -> int:
        if self._direct is not None and start % BLOCK == 0:
            try:
                return os.preadv(self._direct, [memory], start)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise _unreadable(self._path, error) from error
                os.close(self._direct)  # it let itself be opened so, and then refuses
                self._direct = None
        try:
            return os.preadv(self._plain, [memory], start)
        except OSError as error:
            raise _unreadable(self._path, error) from error

    def _check(self) -> None:
        found = os.fstat(self._plain)
        if not self._identity.same_as(found):
            raise CheckpointDamagedError(
                "a weights file was changed while it was in use",
                seen=f"{self._path}: {found.st_size} bytes, written to since it was opened",
                hint="start again, when nothing writes to it any more",
            )

    def close(self) -> None:
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def _unreadable(path: Path, error: OSError) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        "a weights file cannot be read", seen=f"{path} ({error.strerror or error})"
    )


def as_memory(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor of bytes on the host, to be read into."""
    array: Any = tensor.numpy()
    return memoryview(array)
