"""Write files and folders whole or not at all, whatever ends the process.

A file is written under a temporary name beside its target, synced to the disk, then renamed. The
writer holds a lock on the temporary, so the next writer in that folder can tell a dead process's
leavings from a file that is being written, and removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME = re.compile(r"\.danqing-[0-9a-f]{16}\.part")
_POLL_SECONDS = 0.01
_swept: set[tuple[int, int]] = set()


@contextlib.contextmanager
def write_whole(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a file for writing; it takes its name when the block ends without an error.

    Args:
        path: the target; its folder must exist; an existing file is replaced.
        mode: permissions, from which the umask takes away as usual.

    Raises:
        OSError: it cannot be written; the target is as it was.
    """
    with temporary_file(path.parent, mode=mode) as (file, temporary):
        yield file
        sync(file)
        temporary.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def temporary_file(folder: Path, *, mode: int = 0o666) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a new file under a temporary name; the name is removed at the end, if it is left.

    Args:
        folder: where to.
        mode: permissions, from which the umask takes away as usual.
    """
    sweep(folder)
    while True:
        temporary = folder / _name()
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        file = os.fdopen(handle, "w+b")
        if _claim(handle, temporary):
            break
        file.close()
    try:
        with file:
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a private folder; it is removed at the end, if it is left.

    Args:
        parent: where; the system's folder of temporary files if None.

    Raises:
        OSError: it cannot be made.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    sweep(parent)
    while True:
        folder = parent / _name()
        folder.mkdir(mode=0o700)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if _claim(handle, folder):
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@contextlib.contextmanager
def lock(folder: Path, *, seconds: float) -> Iterator[bool]:
    """Hold a folder's lock, which one process or thread at a time can have.

    Args:
        folder: must exist; nothing is written into it.
        seconds: to wait for it at most.

    Yields:
        False if another holder kept it all that time. True if it was obtained, and also where
        the file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + seconds
        while (held := _try_lock(handle)) is False and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        yield held is not False
    finally:
        os.close(handle)  # which releases it


def wait_for_lock(file: BinaryIO) -> None:
    """Lock an open file until it is closed, after any other holder; unsupported, without effect."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def sync(file: BinaryIO) -> None:
    """Wait until what was written is on the disk, so that a name given afterwards never lies."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove temporaries that dead processes of this user left, once for each folder."""
    with contextlib.suppress(OSError):
        status = folder.stat()
        if (key := (status.st_dev, status.st_ino)) in _swept:
            return
        _swept.add(key)
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
        for name in names:
            with contextlib.suppress(OSError):
                _remove_if_dead(folder / name)


def _remove_if_dead(place: Path) -> None:
    """Remove a temporary unless its writer holds it, or it belongs to another user."""
    mode = place.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return
    access = os.O_RDONLY if stat.S_ISDIR(mode) else os.O_RDWR  # NFS locks what is open to write
    handle = os.open(place, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if status.st_uid != os.geteuid() or _try_lock(handle) is not True:
            return
        if stat.S_ISDIR(status.st_mode):
            shutil.rmtree(place)
        else:
            place.unlink()
    finally:
        os.close(handle)


def _name() -> str:
    return f".danqing-{secrets.token_hex(8)}.part"


def _claim(handle: int, place: Path) -> bool:
    """Lock a new temporary; False if a sweep removed it between its making and its locking."""
    return _try_lock(handle) is not False and place.exists()


def _try_lock(handle: int) -> bool | None:
    """Lock an open file or folder; False if another holds it, None where that is unsupported."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) else None
    return True
