"""Standard output and standard error as a command sees them: every text is escaped, no error lost.

Text from files, clients and libraries can hold characters that a terminal obeys. So all output
passes through one place, `streams`, whoever prints it. Only `overwrite` and `raw` go past it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

from danqing.errors import OutputError
from danqing.escaping import escape, escape_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

EXIT_PIPE = 141
"""128 + SIGPIPE: what a shell reports of a program whose reader left."""
_BAR = re.compile(r"(\r?)(.*?)((?:\n|\x1b\[A)*)", re.DOTALL)
"""One write of tqdm: the start of a line, its text, moves to another line."""


class Escaped:
    """A text stream that escapes what could control a terminal.

    It is not an `io.TextIOBase`: those are flushed once more when they are collected.

    Raises:
        OutputError: the stream is closed, or its disk is full. Never raised by a `lenient` stream.
        SystemExit: with `EXIT_PIPE`: nobody reads the pipe any more.
    """

    def __init__(self, stream: TextIO | None, name: str, *, lenient: bool) -> None:
        """Wrap a stream.

        Args:
            stream: the stream, or None where the process was started with it closed.
            name: of the stream, in messages.
            lenient: drop the text if it cannot be written.
        """
        self.stream = stream
        self.bars = False
        self._broken: BaseException | None = None
        self._name = name
        self._lenient = lenient

    def write(self, text: str, /) -> int:
        """Write text, escaped."""
        if self.bars and (match := _BAR.fullmatch(text)):
            self.write_raw(match[1] + escape(match[2]) + match[3])
        else:
            self.write_raw(escape(text))
        return len(text)

    def write_raw(self, text: str) -> None:
        """Write text as it is; characters that the encoding lacks are escaped."""
        if self.stream is None:
            if not self._lenient:
                raise self._failure("it is closed")
            return
        with self._watched():
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding or "ascii"
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """Write what is buffered."""
        if self.stream is not None:
            with self._watched():
                self.stream.flush()

    @property
    def encoding(self) -> str:
        """Encoding of the bytes."""
        return self.stream.encoding if self.stream is not None else "utf-8"

    @property
    def errors(self) -> str | None:
        """How characters are handled that the encoding lacks."""
        return self.stream.errors if self.stream is not None else "strict"

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor."""
        if self.stream is None:
            raise io.UnsupportedOperation(f"{self._name} is closed")
        return self.stream.fileno()

    def writable(self) -> bool:
        """Return True."""
        return True

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    @property
    def closed(self) -> bool:
        """Return False: what is written after the stream is closed is an error of its own."""
        return False

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        if self._broken is not None:
            raise self._broken
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: a closed file
            self._discard()
            if self._lenient:
                self.stream = None
                return
            if isinstance(error, BrokenPipeError):
                self._broken = SystemExit(EXIT_PIPE)
            else:
                reason = error.strerror if isinstance(error, OSError) else None
                self._broken = self._failure(reason or str(error))
            raise self._broken from None

    def _discard(self) -> None:
        """Let what is buffered go to /dev/null: Python would complain of it again at exit."""
        # a stream that a test put there has no descriptor
        with contextlib.suppress(OSError, ValueError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self.fileno())
            os.close(sink)

    def _failure(self, reason: str) -> OutputError:
        return OutputError(f"{self._name} cannot be written", seen=reason)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Escape everything printed while this is open; text that cannot be printed is an error."""
    before = sys.stdout, sys.stderr
    if any(isinstance(stream, Escaped) for stream in before):
        yield
        return
    sys.stdout = cast("TextIO", Escaped(before[0], "standard output", lenient=False))
    sys.stderr = cast("TextIO", Escaped(before[1], "standard error", lenient=True))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def keep_descriptors() -> None:
    """Open /dev/null where a standard stream is closed.

    Otherwise the next file that is opened gets its number, and a library that prints there writes
    into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


def raw(stream: TextIO) -> TextIO:
    """Return the stream below, for those who write control sequences and escape text themselves."""
    if isinstance(stream, Escaped):
        return stream.stream if stream.stream is not None else io.StringIO()
    return stream


def overwrite(text: str, *, end: str = "") -> None:
    """Print on standard error over the line before it."""
    line = f"\r{escape(text, one_line=True)}{end}"
    if isinstance(sys.stderr, Escaped):
        sys.stderr.write_raw(line)
    else:
        print(line, end="", file=sys.stderr)
    sys.stderr.flush()


@contextlib.contextmanager
def bars() -> Iterator[None]:
    """Let a library's progress bars move the cursor on standard error; their text is escaped."""
    stream = sys.stderr
    if not isinstance(stream, Escaped):
        yield
        return
    stream.bars = True
    try:
        yield
    finally:
        stream.bars = False


def print_json(value: Any, indent: int | None = None) -> None:
    """Print JSON that is harmless on a terminal, and the same value when it is read."""
    print(escape_json(json.dumps(value, ensure_ascii=False, indent=indent)))


def print_line(text: object) -> None:
    """Print one line on standard output, line breaks inside it escaped."""
    print(escape(str(text), one_line=True))
