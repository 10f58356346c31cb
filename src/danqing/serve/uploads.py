"""Images uploaded on the page, for an hour: bounded for each client, and read by it alone."""

from __future__ import annotations

import io
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danqing.errors import BusyError, RequestError
from danqing.quantities import size as in_words
from danqing.serve.form_body import split_form
from danqing.serve.sent_images import IMAGE_FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

KEPT_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class Quota:
    """The most uploads that lie on the disk.

    Attributes:
        files: of one client; its oldest makes room.
        bytes: of one client.
        all_files: of all clients.
        all_bytes: of all clients.
        file_bytes: of one file.
    """

    files: int = 64
    bytes: int = 256 << 20
    all_files: int = 1024
    all_bytes: int = 1 << 30
    file_bytes: int = 40 << 20


@dataclass(frozen=True)
class _Upload:
    path: Path
    client: str
    size: int
    since: float


class Uploads:
    """The uploaded files of one server."""

    def __init__(self, folder: Path, quota: Quota | None = None) -> None:
        """Keep files below a folder that is this server's own."""
        self._folder = folder
        self._quota = quota or Quota()
        self._files: dict[str, _Upload] = {}
        self._lock = threading.Lock()

    def __contains__(self, path: object) -> bool:
        """Say whether a file is an upload that is still here."""
        return str(path) in self._files

    def take(self, body: bytearray, content_type: str, client: str) -> list[str]:
        """Write the files of a form, under names of the server's choice; return where.

        Raises:
            RequestError: one is not a PNG, JPEG or WebP, or too large.
            BusyError: uploads of all clients take too much room.
        """
        files = [part.data for part in split_form(body, content_type) if part.is_file]
        kinds = [self._judge(file) for file in files]
        with self._lock:
            self._sweep()
            self._make_room(client, len(files), sum(map(len, files)))
            return [
                self._write(file, kind, client) for file, kind in zip(files, kinds, strict=True)
            ]

    def _judge(self, data: memoryview) -> str:
        """Return a file's format; nothing but its header is decoded."""
        from PIL import Image

        if len(data) > self._quota.file_bytes:
            raise RequestError(
                "the file is too large",
                seen=in_words(len(data)),
                allowed=in_words(self._quota.file_bytes),
            )
        try:
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                return str(image.format).lower()
        except Exception as error:  # Pillow raises many kinds for broken files
            raise RequestError("the file is not an image", allowed="PNG, JPEG, WebP") from error

    def _make_room(self, client: str, count: int, size: int) -> None:
        own = [one for one in self._files.values() if one.client == client]
        if count > self._quota.files or size > self._quota.bytes:
            raise RequestError("too many files", seen=count, allowed=f"{self._quota.files} at once")
        while own and (
            len(own) + count > self._quota.files
            or sum(one.size for one in own) + size > self._quota.bytes
        ):
            self._drop([own.pop(0)])
        held = sum(one.size for one in self._files.values())
        if len(self._files) + count > self._quota.all_files or held + size > self._quota.all_bytes:
            raise BusyError(
                "uploads take too much room",
                seen=f"{len(self._files)} files, {in_words(held)}",
                allowed=f"{self._quota.all_files} files, {in_words(self._quota.all_bytes)}",
                retry_after=60,
            )

    def _write(self, data: memoryview, kind: str, client: str) -> str:
        path = self._folder / secrets.token_hex(16) / f"image.{kind}"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        self._files[str(path)] = _Upload(path, client, len(data), time.monotonic())
        return str(path)

    def read(self, path: str, client: str) -> bytes:
        """Return the bytes of an upload of this client.

        Raises:
            RequestError: it is not there, or of somebody else.
        """
        with self._lock:
            found = self._files.get(path)
            if found is not None and found.client == client:
                return found.path.read_bytes()
        raise RequestError("the image is not here any more", hint="upload it again")

    def sweep(self) -> None:
        """Drop files that are old."""
        with self._lock:
            self._sweep()

    def _sweep(self) -> None:
        until = time.monotonic() - KEPT_SECONDS
        self._drop([one for one in self._files.values() if one.since < until])

    def _drop(self, files: Iterable[_Upload]) -> None:
        for one in files:
            del self._files[str(one.path)]
            shutil.rmtree(one.path.parent, ignore_errors=True)
