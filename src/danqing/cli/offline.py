"""`--offline-proof`: fails if anything in the process turns to the network."""

from __future__ import annotations

import contextlib
import sys
import traceback
from typing import TYPE_CHECKING

from danqing.errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMES = frozenset({"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"})
_ADDRESSED = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})
_state: dict[str, list[str] | None] = {"opened": None, "hooked": None}


@contextlib.contextmanager
def offline_proof() -> Iterator[None]:
    """Refuse to look up or reach any host while this is open; raise at its end if it was tried.

    Python tells its audit hooks of each attempt, also where a library swallows the refusal. What C
    code does past Python is not seen. A socket that is made and reaches nobody is no attempt:
    urllib3 makes one, as it is imported, to see whether there is IPv6.

    Raises:
        DownloadError: somebody tried; the message says who.
    """
    opened: list[str] = []
    if not _state["hooked"]:
        sys.addaudithook(_hook)  # for the life of the process: a hook cannot be taken away
        _state["hooked"] = ["yes"]
    _state["opened"] = opened
    try:
        yield
    finally:
        _state["opened"] = None
        if opened:
            raise DownloadError(
                "something turned to the network, which nothing here may",
                seen=opened[0],
                hint="this is a bug in danqing or in a library; please report it",
            )


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    opened = _state["opened"]
    if opened is None or event not in _NAMES | _ADDRESSED:
        return
    if event in _ADDRESSED and not isinstance(arguments[1], tuple):
        return  # a socket of this machine alone has a path for an address
    callers = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_stack(limit=12)
        if "socket.py" not in frame.filename and not frame.filename.endswith("offline.py")
    ]
    opened.append(f"{event} from {callers[-1] if callers else 'unknown'}")
    raise PermissionError("no network here: --offline-proof")
