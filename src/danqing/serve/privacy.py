"""What clients may read: errors and records without any path of the server.

Errors about a client's own request are answered whole. Of all others the client reads what kind of
failure it was and under which id the server's log has the cause: what they say may name files.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from danqing.errors import (
    BrokenPictureError,
    BusyError,
    CancelledError,
    ClosingError,
    DanqingError,
    DeadlineError,
    DeviceError,
    DoesNotFitError,
    JournalBusyError,
    JournalError,
    OutputError,
    RefusedPictureError,
    RequestError,
)
from danqing.escaping import escape
from danqing.files import expand

if TYPE_CHECKING:
    from collections.abc import Mapping

HIDDEN = "<path>"
_OPEN = (
    RequestError, BusyError, ClosingError, DeadlineError, CancelledError, RefusedPictureError,
    BrokenPictureError, DoesNotFitError, JournalBusyError,
)  # fmt: skip
_WORDS: tuple[tuple[type[DanqingError], str], ...] = (
    (OutputError, "the server cannot store the job"),
    (DeviceError, "the device failed"),
    (DanqingError, "the server failed"),
)
_hidden: set[str] = set()


def hide(*places: str | Path) -> None:
    """Let no answer name these files and folders: models, components, the journal."""
    for place in places:
        path = expand(place)
        for text in (str(path), str(path.absolute()), str(path.resolve())):
            if PurePath(text).is_absolute() and len(PurePath(text).parts) > 1:
                _hidden.add(text)
    _roots.cache_clear()


@lru_cache(maxsize=1)
def _roots() -> tuple[str, ...]:
    """Return the folders of this machine that no answer may name, the longest first."""
    package = Path(__file__).parents[2]
    places = {str(expand("~")), sys.prefix, str(package)} | _hidden
    for find in (os.getcwd, tempfile.gettempdir):
        with contextlib.suppress(OSError):  # the folder was removed, or none can be written
            places.add(find())
    return tuple(sorted((one for one in places if len(one) > 1), key=len, reverse=True))


def scrub(text: str) -> str:
    """Return a text with every path into a folder of the server replaced."""
    for root in _roots():
        while (start := text.find(root)) >= 0:
            end = start + len(root)
            while end < len(text) and not (text[end].isspace() or text[end] in "'\"`,;:()<>|"):
                end += 1
            text = text[:start] + HIDDEN + text[end:]
    return text


def public_message(error: DanqingError, about: str) -> str:
    """Return what a client reads of an error.

    Args:
        error: that ended a request or a job.
        about: id of the request or the job, by which the log is searched.
    """
    if isinstance(error, _OPEN):
        return escape(scrub(str(error)))
    if isinstance(error, JournalError):  # says what happened to the job, in words of its own
        what = scrub(error.what)
    else:
        what = next(words for kind, words in _WORDS if isinstance(error, kind))
    return str(DanqingError(what, hint=f"the server's log has the cause under {about}"))


def public_record(record: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return a picture's record that names the model as the server does, and no path.

    The record's fingerprint and digests still say which weights they were. `danqing generate
    --from` looks for the model by that name, or takes the place that `--model-path` says.

    Args:
        record: `danqing.generation.Picture.record`.
        model: name under which it is served.
    """
    origin = record["provenance"]
    public = dict(origin["model"])
    if "path" in public:
        public["path"] = model
    if "components" in public:
        public["components"] = {
            name: PurePath(str(place)).name for name, place in public["components"].items()
        }
    notes = [scrub(str(note)) for note in record.get("notes", ())]
    return {**record, "provenance": {**origin, "model": public}, "notes": notes}
