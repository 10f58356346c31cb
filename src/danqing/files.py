"""Open files that came from elsewhere: regular files only, so that none can block the reader."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISDIR, "a folder"),
)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes.

    Reading a named pipe blocks until somebody writes to it, and reading a device may never end.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be opened, or it is not a regular file (`errno.EINVAL`; the text names
            what it is).
    """
    _require_regular(Path(path).stat().st_mode, path)  # opening a device may have effects
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(os.fstat(handle).st_mode, path)  # it may have been replaced in between
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: of the file.
        limit: the most bytes the file may have; None for any number.

    Raises:
        OSError: as `open_regular`, or the file is larger than the limit (`errno.EFBIG`).
    """
    with open_regular(path) as file:
        if limit is None:
            return file.read()
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"the file is larger than {limit} bytes", str(path))
    return data


def read_text(path: Path, limit: int | None = None) -> str:
    """Return a regular file's text, UTF-8; see `read_regular`."""
    return read_regular(path, limit).decode("utf-8")


def expand(path: str | os.PathLike[str]) -> Path:
    """Expand `~` in a path; leave it as it is where that home is unknown, as shells do."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _require_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a special file")
    raise OSError(errno.EINVAL, f"not a regular file but {kind}", str(path))
