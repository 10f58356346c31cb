"""Log lines of libraries that a user should not see."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def without_message(logger: str, start: str) -> Iterator[None]:
    """Keep one library message, known by its beginning, from being shown."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    chosen = logging.getLogger(logger)
    chosen.addFilter(keep)
    try:
        yield
    finally:
        chosen.removeFilter(keep)
