"""What is kept between runs in the user's cache folder: small tables, and compiled code."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from danqing.atomic import lock, write_whole

_NOWHERE = Path("/nonexistent")
_LOCK_SECONDS = 5.0
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def cache_folder() -> Path:
    """Return the folder; it need not exist."""
    return caches() / "danqing"


def caches() -> Path:
    """Return the user's folder of caches, danqing's among them; it need not exist."""
    return in_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def in_home(path: str) -> Path:
    """Return a path with its `~` filled in; for a user without a home, one that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # HOME is not set, and the user is in no list of users
        return _NOWHERE / path.removeprefix("~/")


def make_folder(folder: Path) -> None:
    """Make a folder within the cache; the cache itself is private, whatever the umask.

    Raises:
        OSError: it cannot be made.
    """
    top = cache_folder()
    top.parent.mkdir(parents=True, exist_ok=True)
    top.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def keep_compiled(default: str) -> None:
    """Let torch.compile keep its results here, not where they are gone when the machine restarts.

    Args:
        default: the folder that torch takes by itself; one that the user named in
            TORCHINDUCTOR_CACHE_DIR is left as it is.
    """
    if os.environ.get(_COMPILED, default) == default:
        os.environ[_COMPILED] = str(cache_folder() / "compiled")


def read_table(place: Path) -> dict[str, object]:
    """Return a table; an empty one if there is none, or none that can be read."""
    try:
        table = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def add_to_table(place: Path, key: str, value: object) -> None:
    """Add a row to a table; without effect where the cache cannot be written.

    Rows of processes that write at the same time are all kept: the table is read and replaced
    under the folder's lock.
    """
    with contextlib.suppress(OSError):
        make_folder(place.parent)
        with lock(place.parent, seconds=_LOCK_SECONDS) as held:
            if not held:
                return
            table = {**read_table(place), key: value}
            with write_whole(place, mode=0o600) as file:
                file.write(json.dumps(table, indent=1).encode())
