"""A folder for what a command needs only while it runs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from danqing.atomic import temporary_folder
from danqing.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a private folder among the system's temporary ones, and remove it at the end.

    Raises:
        OutputError: the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder())
        except OSError as error:
            raise OutputError(
                "no folder for temporary files can be written",
                seen=f"{error.filename or 'TMPDIR'}: {error.strerror or error}",
                hint="set TMPDIR to a folder that can be written",
            ) from error
        yield folder
