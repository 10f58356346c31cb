"""SHA-256 of weights files, each computed once: kept by size and the times of last change."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from danqing.cache import add_to_table, cache_folder, read_table
from danqing.errors import CheckpointDamagedError
from danqing.files import open_regular

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from danqing.weights.checkpoint import Checkpoint

_BLOCK_BYTES = 2**22

KNOWN = {
    "9403429e0052277ac2a87ad800adece5481eecefd9ed334e1f348723621d2a0a": "FLUX.1-schnell",
    "4610115bb0c89560703c892c59ac2742fa821e60ef5871b33493ba544683abd7": "FLUX.1-dev",
    "843a26dc765d3105dba081c30bce7b14c65b0988f9e8d14e9fbc8856a6deebd5": "FLUX.1-Kontext-dev",
    "03e289f530df51d014f48e675a9ffa2141bc003259bf5f25d75b957e920a41ca": "FLUX.1-Fill-dev",
    "996876670169591cb412b937fbd46ea14cbed6933aef17c48a2dcd9685c98cdb": "FLUX.1-Canny-dev",
    "41360d1662f44ca45bc1b665fe6387e91802f53911001630d970a4f8be8dac21": "FLUX.1-Depth-dev",
}
"""Transformers of the BFL release, by the digests published in its repository (docs/)."""


def sha256(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Return a file's SHA-256 in hex: from the cache if the file has not changed since.

    Args:
        path: the file.
        on_bytes: told the bytes read so far.

    Raises:
        CheckpointDamagedError: the file cannot be read.
    """
    if (kept := cached_sha256(path)) is not None:
        return kept
    digest, done = hashlib.sha256(), 0
    try:
        before = path.stat()
        with open_regular(path) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                done += len(block)
                on_bytes(done)
        after = path.stat()
    except OSError as error:
        raise CheckpointDamagedError(
            "the file cannot be read", seen=f"{path} ({error.strerror or error})"
        ) from error
    if _stamp(before) != _stamp(after):
        raise CheckpointDamagedError("the file changed while it was read", seen=path)
    _keep(path, after, digest.hexdigest())
    return digest.hexdigest()


def cached_sha256(path: Path) -> str | None:
    """Return a file's digest if it was computed before and the file has not changed since."""
    return _kept(_read(), path)


def _kept(table: Mapping[str, object], path: Path) -> str | None:
    try:
        found = path.stat()
    except OSError:
        return None
    row = table.get(str(path.resolve()))
    stamp = _stamp(found)
    if isinstance(row, list) and len(row) == len(stamp) + 1 and row[:-1] == stamp:
        return str(row[-1])
    return None


def _stamp(found: os.stat_result) -> list[int]:
    """Return what changes with a file; programs that copy can set mtime back, but not ctime."""
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def known_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the digests that were computed before, by component and file; computes none."""
    table = _read()
    return {
        f"{name}/{path.name}": digest
        for name, part in checkpoint.components.items()
        for path in part.files
        if (digest := _kept(table, path)) is not None
    }


def cache_file() -> Path:
    """Return where the digests are kept."""
    return cache_folder() / "digests.json"


def _read() -> dict[str, object]:
    return read_table(cache_file())


def _keep(path: Path, found: os.stat_result, digest: str) -> None:
    add_to_table(cache_file(), str(path.resolve()), [*_stamp(found), digest])
