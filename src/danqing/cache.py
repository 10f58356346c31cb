"""What is kept between runs in the user's cache folder: small tables, and compiled code."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def cache_folder() -> Path:
    """Return the folder; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "danqing"


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
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def add_to_table(place: Path, key: str, value: object) -> None:
    """Add a row to a table; a cache that cannot be written is done without."""
    table: Mapping[str, object] = {**read_table(place), key: value}
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=place.parent, suffix=".part")
        with os.fdopen(handle, "w") as file:
            json.dump(table, file, indent=1)
        Path(unfinished).replace(place)
