"""Hubs that models are downloaded from; their own clients do the talking.

Files land in the cache where those clients, and so diffusers and transformers, look for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from danqing.atomic import sync, sync_folder, wait_for_lock, write_whole
from danqing.errors import (
    CheckpointNotFoundError,
    DownloadError,
    InstallationError,
    RequestError,
)
from danqing.weights.digests import sha256
from danqing.weights.places import find, hugging_face_cache, model_scope_cache

if TYPE_CHECKING:
    from collections.abc import Callable

_ATTEMPTS = 3
"""At a file of which nothing more comes; the client itself tries again, too, in some versions."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: its path there, bytes, and SHA-256 where the hub tells it."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None = None


class Hub(ABC):
    """One repository at one revision on a hub."""

    @abstractmethod
    def files(self) -> list[RemoteFile]:
        """List the repository's files."""

    @abstractmethod
    def held(self, file: RemoteFile) -> bool:
        """Say whether a file is on this disk already."""

    @abstractmethod
    def fetch(self, file: RemoteFile) -> None:
        """Download a file, going on where an earlier attempt stopped; checked before it is named.

        Raises:
            DownloadError: it could not be had, or is not what the hub announced.
        """

    @abstractmethod
    def finish(self) -> Path:
        """Return the folder, when all files are there."""

    @property
    @abstractmethod
    def cache(self) -> Path:
        """Where it goes."""


# --- Hugging Face --------------------------------------------------------------------------------


class HuggingFace(Hub):
    """A repository on the Hugging Face Hub, or at HF_ENDPOINT.

    In huggingface_hub 2.4 a download that was killed begins from nothing: its temporary file has a
    name of its own each time. Here it has the name of its content, so that it is gone on with; the
    bytes are fetched by the client's own `http_get`.
    """

    def __init__(self, name: str, revision: str) -> None:
        """Keep what to ask for."""
        self._name = name
        self._revision = revision
        self._commit = ""
        self._home = hugging_face_cache() / f"models--{name.replace('/', '--')}"

    @property
    def cache(self) -> Path:
        """The client's cache."""
        return hugging_face_cache()

    def files(self) -> list[RemoteFile]:
        """Ask the hub for the revision's commit and files."""
        from huggingface_hub import HfApi

        info = self._asked(
            lambda: HfApi().model_info(self._name, revision=self._revision, files_metadata=True)
        )
        self._commit = str(info.sha)
        return [
            RemoteFile(
                path=row.rfilename,
                size=int(row.size or 0),
                sha256=row.lfs.sha256 if row.lfs else None,
                git_sha1=row.blob_id,
            )
            for row in info.siblings or ()
        ]

    def held(self, file: RemoteFile) -> bool:
        """Say whether the file is in the snapshot, with the right size."""
        link = self._link(file)
        return link.is_file() and link.stat().st_size == file.size

    def fetch(self, file: RemoteFile) -> None:
        """Download a file into the cache's blobs, then name it in the snapshot."""
        blob = self._home / "blobs" / (file.sha256 or file.git_sha1 or file.path)
        try:
            blob.parent.mkdir(parents=True, exist_ok=True)
            if not (blob.is_file() and blob.stat().st_size == file.size):
                self._download(file, blob)
            link = self._link(file)
            link.parent.mkdir(parents=True, exist_ok=True)
            up = Path(*[".."] * (len(PurePosixPath(file.path).parts) + 1))
            _link(link, up / "blobs" / blob.name)
        except OSError as error:
            raise DownloadError(
                "the cache cannot be written", seen=f"{blob} ({error.strerror or error})"
            ) from error

    def _download(self, file: RemoteFile, blob: Path) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._headers import build_hf_headers

        url = hf_hub_url(self._name, file.path, revision=self._commit)
        unfinished = blob.with_name(f"{blob.name}.incomplete")
        with _open_locked(unfinished) as part:
            if blob.is_file() and blob.stat().st_size == file.size:
                # another process finished it while this one waited
                unfinished.unlink(missing_ok=True)
                return
            if part.tell() > file.size:
                part.truncate(0)
                part.seek(0)
            failures = 0
            while (done := part.tell()) < file.size:
                get = partial(
                    http_get, url, part, resume_size=done, headers=build_hf_headers(),
                    expected_size=file.size, displayed_filename=file.path,
                )  # fmt: skip
                try:
                    self._asked(get)
                except DownloadError as error:
                    failures = 0 if part.tell() > done else failures + 1
                    if _status(error.__cause__) is not None or failures > _ATTEMPTS:
                        raise
                    time.sleep(1)
            sync(part)
            if not _is_announced(unfinished, file):
                unfinished.unlink()
                raise DownloadError(
                    "the file is not what the hub announced; it was removed",
                    seen=f"{self._name}: {file.path}",
                    allowed=f"SHA-256 {file.sha256}" if file.sha256 else f"blob {file.git_sha1}",
                    hint="try again; if it happens once more, the hub or something between is "
                    "broken",
                )
            unfinished.replace(blob)
        sync_folder(blob.parent)

    def finish(self) -> Path:
        """Note which commit the revision is, as the client does; return the snapshot."""
        if self._revision != self._commit:
            ref = self._home / "refs" / self._revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            with write_whole(ref) as file:
                file.write(self._commit.encode())
        return self._home / "snapshots" / self._commit

    def _link(self, file: RemoteFile) -> Path:
        return self._home / "snapshots" / self._commit / file.path

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """Call the client; say what its errors mean."""
        from huggingface_hub import errors

        name = self._name
        try:
            return ask()
        except errors.GatedRepoError as error:
            raise DownloadError(
                "this repository is gated: its owner asks for your agreement first",
                seen=name,
                hint=f"agree at https://huggingface.co/{name}, then set HF_TOKEN to your token "
                "(or run hf auth login)",
            ) from error
        except errors.RevisionNotFoundError as error:
            raise DownloadError("revision not found", seen=f"{name}: {self._revision}") from error
        except errors.RepositoryNotFoundError as error:
            raise DownloadError(
                "repository not found, or it is private and the token is missing or wrong",
                seen=name,
                hint="HF_TOKEN holds the token",
            ) from error
        except errors.HFValidationError as error:
            raise RequestError(
                "this is no id of a repository", seen=name, allowed="owner/name"
            ) from error
        except errors.OfflineModeIsEnabled as error:
            raise DownloadError(
                "the client was told to stay offline", seen="HF_HUB_OFFLINE", hint="unset it"
            ) from error
        except (errors.HfHubHTTPError, OSError) as error:
            raise _network_error(name, error) from error
        except Exception as error:  # the client's HTTP library has a tree of its own
            if type(error).__module__.split(".")[0] in _HTTP_LIBRARIES:
                raise _network_error(name, error) from error
            raise


_HTTP_LIBRARIES = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2")


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status an error of the client carries; None if there was no answer."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _network_error(name: str, error: BaseException) -> DownloadError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    status = _status(error)
    if status == 429:  # noqa: PLR2004
        what, hint = "the hub asks to wait: too many requests", "try again in some minutes"
    elif status is not None and status >= 500:  # noqa: PLR2004
        what, hint = "the hub has a fault of its own", "try again later"
    elif status in (401, 403):
        what, hint = (
            "the hub refuses: the token is missing, wrong, or has no access",
            "see HF_TOKEN",
        )
    else:
        what, hint = (
            "the hub cannot be reached, or the connection broke",
            ("what is complete stays; the same command goes on from there"),
        )
    return DownloadError(what, seen=f"{name}: {first[:300]}", hint=hint)


def _link(link: Path, target: Path) -> None:
    """Make a symbolic link; another process may make the same one meanwhile."""
    while True:
        try:
            link.symlink_to(target)
        except FileExistsError:
            if os.path.islink(link) and os.path.realpath(link) == os.path.realpath(  # noqa: PTH114
                link.parent / target
            ):
                return
            link.unlink(missing_ok=True)
        else:
            return


def _open_locked(unfinished: Path) -> BinaryIO:
    """Open a download to append to it, when no other process does so any more."""
    while True:
        part = unfinished.open("ab")
        try:
            wait_for_lock(part)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(part.fileno()), unfinished.stat()):
                    return part
        except BaseException:
            part.close()
            raise
        part.close()  # the other process renamed or removed it


def _is_announced(path: Path, file: RemoteFile) -> bool:
    """Compare a file with its SHA-256 or, of a small file, with git's SHA-1."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.sha256:
        return sha256(path) == file.sha256
    if not file.git_sha1:
        return True
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return blob.hexdigest() == file.git_sha1


# --- ModelScope ----------------------------------------------------------------------------------


class ModelScope(Hub):
    """A repository on ModelScope, or at MODELSCOPE_DOMAIN; its client does all the work."""

    def __init__(self, name: str, revision: str) -> None:
        """Keep what to ask for."""
        self._name = name
        self._revision = revision
        self._folder: Path | None = None

    @property
    def cache(self) -> Path:
        """The client's cache."""
        return model_scope_cache()

    def files(self) -> list[RemoteFile]:
        """Ask the hub for its files."""
        api = self._client("modelscope.hub.api").HubApi()
        rows = self._asked(
            lambda: api.get_model_files(self._name, revision=self._revision, recursive=True)
        )
        return [
            RemoteFile(path=row["Path"], size=int(row["Size"]), sha256=row.get("Sha256"))
            for row in rows
            if row.get("Type") != "tree"
        ]

    def held(self, file: RemoteFile) -> bool:
        """Say whether the file is where danqing looks for it, with the right size."""
        if self._folder is None:
            try:
                self._folder = find(self._name)
            except CheckpointNotFoundError:
                return False
        path = self._folder / file.path
        return path.is_file() and path.stat().st_size == file.size

    def fetch(self, file: RemoteFile) -> None:
        """Download a file with the client, then compare its digest."""
        client = self._client("modelscope.hub.snapshot_download")
        logging.getLogger("modelscope_hub").setLevel(logging.WARNING)
        folder = Path(
            self._asked(
                lambda: client.snapshot_download(
                    self._name, revision=self._revision, allow_patterns=[file.path]
                )
            )
        )
        self._folder = folder
        path = folder / file.path
        if not path.is_file() or not _is_announced(path, file):
            path.unlink(missing_ok=True)
            raise DownloadError(
                "the file is not what the hub announced; it was removed",
                seen=f"{self._name}: {file.path}",
                allowed=f"SHA-256 {file.sha256}",
            )

    def finish(self) -> Path:
        """Return the client's folder."""
        if self._folder is None:
            msg = "nothing was fetched"
            raise RuntimeError(msg)
        return self._folder

    def _client(self, module: str) -> Any:
        import importlib

        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise InstallationError(
                "downloading from ModelScope needs its client",
                seen=str(error),
                hint="pip install modelscope",
            ) from error

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except DownloadError:
            raise
        except Exception as error:  # the client raises bare exceptions, too
            raise _network_error(self._name, error) from error
