"""The error tree: every error a user can meet, with its exit code and HTTP status.

A message says what happened; `seen` is the value that caused it, `allowed` what would have been
accepted, and `hint` what to do next. The command line prints all four and exits with `exit_code`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Unpack


_CONTINUED = re.compile(r"\n {0,4}")


class Parts(TypedDict, total=False):
    """What an error says beside what happened; see `DanqingError`."""

    seen: object
    allowed: str | None
    hint: str | None


class DanqingError(Exception):
    """Something went wrong that danqing can explain.

    Args:
        what: one sentence: what happened.
        seen: the value that caused it, as the user wrote it or as it lies on disk.
        allowed: what would have been accepted.
        hint: what to do next.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(
        self,
        what: str,
        *,
        seen: object = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        """Keep the parts, to be printed one to a line."""
        super().__init__(what)
        self.what = what
        self.seen = None if seen is None else str(seen)
        self.allowed = allowed
        self.hint = hint

    def __str__(self) -> str:
        """Return the message with its parts, each on a line; further lines of a part are indented.

        A part can hold text from outside, which must not look like a line of our own.
        """
        rows = [("seen", self.seen), ("allowed", self.allowed), ("hint", self.hint)]
        parts = [self.what, *(f"  {label}: {text}" for label, text in rows if text)]
        return "\n".join(_CONTINUED.sub("\n    ", part) for part in parts)


class RequestError(DanqingError):
    """A request, or a command line, asks for something that cannot be.

    Args:
        what: as of every error.
        setting: the name of the setting that is at fault, where it is one.
        parts: as of every error.
    """

    exit_code = 2
    http_status = 400

    def __init__(self, what: str, *, setting: str | None = None, **parts: Unpack[Parts]) -> None:
        """Keep the parts."""
        super().__init__(what, **parts)
        self.setting = setting


class NoEffectError(RequestError):
    """A setting was given that would change nothing in this model."""


class UnknownSettingError(RequestError):
    """A setting was given that does not exist."""


class UntrustedRecordError(RequestError):
    """A record names files to open, and neither the command line nor `--trust` agrees."""


class ModelNotFoundError(RequestError):
    """A server has no model of the name that a request gives."""

    http_status = 404


class CheckpointError(DanqingError):
    """The weights on disk cannot be used."""

    exit_code = 3
    http_status = 500


class CheckpointNotFoundError(CheckpointError):
    """There are no weights at the place named."""

    http_status = 404


class CheckpointIncompleteError(CheckpointError):
    """A component, a shard or a small file is missing."""


class CheckpointDamagedError(CheckpointError):
    """A file is not what its name or its header promises."""


class TensorMismatchError(CheckpointError):
    """Tensors are missing, unexpected, or of the wrong shape."""


class UnsafeFileError(CheckpointError):
    """A file would run code when opened (a pickle), so it is not opened."""


class UnknownModelError(CheckpointError):
    """The weights are sound, but of a model danqing does not know."""


class DeviceError(DanqingError):
    """The device asked for cannot be used."""

    exit_code = 4
    http_status = 503


class UnknownDeviceError(DeviceError):
    """No such device name."""

    http_status = 400


class DeviceUnavailableError(DeviceError):
    """The device is known, but it is not here; the message says why."""


class DtypeError(DeviceError):
    """The device does not compute in the dtype asked for."""

    http_status = 400


class DeviceFailedError(DeviceError):
    """The device's own software failed while it worked; the message says what that means."""

    http_status = 500


class KernelError(DeviceError):
    """The device has no kernel of the kind asked for."""

    http_status = 400


class DoesNotFitError(DanqingError):
    """The plan, or the device while running, ran out of memory."""

    exit_code = 5
    http_status = 507


class BrokenPictureError(DanqingError):
    """The pixels are not a picture: not finite, black, or one flat colour."""

    exit_code = 6
    http_status = 500


class OutputError(DanqingError):
    """A picture cannot be written, or read back."""

    exit_code = 7
    http_status = 507


class JournalError(OutputError):
    """A server's journal cannot be opened, read or written."""

    http_status = 500


class JournalFullError(JournalError):
    """The disk that holds a server's journal is full."""

    http_status = 507


class JournalBusyError(JournalError):
    """A server's journal, or an earlier request with the same Idempotency-Key, took too long."""

    http_status = 503


class TraceError(DanqingError):
    """A trace cannot be read, or two cannot be compared."""

    exit_code = 10
    http_status = 400


class InstallationError(DanqingError):
    """A library danqing needs is missing or cannot be loaded."""

    exit_code = 8
    http_status = 500


class DownloadError(DanqingError):
    """A hub or the network failed, or refused; nothing that is not whole looks so."""

    exit_code = 9
    http_status = 502


class BusyError(DanqingError):
    """A server has as much to do as it takes on.

    Args:
        what: as of every error.
        retry_after: seconds after which there may be room.
        parts: as of every error.
    """

    exit_code = 11
    http_status = 429

    def __init__(self, what: str, *, retry_after: int = 1, **parts: Unpack[Parts]) -> None:
        """Keep the parts."""
        super().__init__(what, **parts)
        self.retry_after = retry_after


class ClosingError(DanqingError):
    """A server is being stopped and takes nothing on."""

    exit_code = 11
    http_status = 503


class DeadlineError(DanqingError):
    """A picture was not finished in the time that a server gives it."""

    exit_code = 11
    http_status = 504


class CancelledError(DanqingError):
    """A job was taken back by who gave it."""

    exit_code = 11
    http_status = 409


class RefusedPictureError(DanqingError):
    """A safety checker refused a picture."""

    exit_code = 12
    http_status = 400
