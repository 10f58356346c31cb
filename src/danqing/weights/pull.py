"""`danqing pull`: the one place that downloads, and only what a layout needs."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from danqing.errors import DownloadError, RequestError
from danqing.weights.hubs import Hub, HuggingFace, ModelScope, RemoteFile
from danqing.weights.kinds import RELEASED_FOLDERS
from danqing.weights.places import free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

LAYOUTS = ("auto", "diffusers", "bfl")
_ROOT_FILES = ("model_index.json", "prompt_template.json")
"""What a diffusers folder may have beside its components."""
HUBS = ("huggingface", "modelscope")
_WEIGHTS = (".safetensors", ".sft", ".gguf")
_VARIANT = (".fp16.", ".bf16.", ".fp32.", ".non_ema.", ".ema.")
_MANY = 12


@dataclass(frozen=True)
class Pulled:
    """What was downloaded: the folder, its files, and the bytes that had to be fetched."""

    path: Path
    files: tuple[RemoteFile, ...]
    fetched_bytes: int


def pull(
    name: str,
    *,
    source: str = "huggingface",
    revision: str | None = None,
    layout: str = "auto",
    include: Sequence[str] = (),
    dry_run: bool = False,
    on_plan: Callable[[int, int, Path], None] = lambda *_: None,
    on_file: Callable[[RemoteFile, int, int], None] = lambda *_: None,
) -> Pulled:
    """Download a model's files.

    Args:
        name: the repository's id, `owner/name`.
        source: one of `HUBS`.
        revision: branch, tag or commit.
        layout: one of `LAYOUTS`; `auto` is diffusers' where the repository has it.
        include: patterns of files to take instead.
        dry_run: only find out what would be fetched.
        on_plan: told how many files are to be fetched, of how many bytes, and where to.
        on_file: told each file before it is fetched, with its number and how many there are.

    Raises:
        RequestError: no such hub or layout, or the repository leaves it open what to take.
        DownloadError: anything that goes wrong with the hub or the network.
    """
    if layout not in LAYOUTS:
        raise RequestError("unknown layout", seen=layout, allowed=", ".join(LAYOUTS))
    hub = _hub(source, name, revision)
    files = choose(hub.files(), name=name, layout=layout, include=include)
    absent = [file for file in files if not hub.held(file)]
    needed = sum(file.size for file in absent)
    _check_space(hub.cache, needed)
    on_plan(len(absent), needed, hub.cache)
    for number, file in enumerate(absent, start=1):
        on_file(file, number, len(absent))
        if not dry_run:
            hub.fetch(file)
    path = hub.cache if dry_run else hub.finish()
    return Pulled(path=path, files=tuple(files), fetched_bytes=needed)


def _hub(source: str, name: str, revision: str | None) -> Hub:
    if source == "huggingface":
        return HuggingFace(name, revision or "main")
    if source == "modelscope":
        return ModelScope(name, revision or "master")
    raise RequestError("unknown hub", seen=source, allowed=", ".join(HUBS))


def _check_space(cache: Path, needed: int) -> None:
    free = free_bytes(cache)
    if free < needed:
        raise DownloadError(
            "there is not enough free space on the disk",
            seen=f"{free} bytes free at {cache}",
            allowed=f"{needed} bytes",
            hint="HF_HUB_CACHE, or MODELSCOPE_CACHE, names another disk",
        )


# --- which files ---------------------------------------------------------------------------------


def choose(
    files: Iterable[RemoteFile], *, name: str, layout: str, include: Sequence[str]
) -> list[RemoteFile]:
    """Return the files a layout needs: never both copies of a model, never a pickle.

    Raises:
        RequestError: nothing fits, or it is left open which of several files is meant.
    """
    files = [file for file in files if _is_harmless(file.path)]
    if include:
        chosen = [file for file in files if any(fnmatch.fnmatch(file.path, row) for row in include)]
        return _some(chosen, name, f"files like {', '.join(include)}", files)
    has_index = any(file.path == "model_index.json" for file in files)
    wanted = layout if layout != "auto" else ("diffusers" if has_index else "files")
    if wanted == "diffusers":
        return _some(_diffusers(files), name, "a diffusers folder", files)
    loose = [file for file in files if "/" not in file.path and _is_weights(file.path)]
    if wanted == "bfl":
        beside = [file for file in _diffusers(files) if _is_beside(file)]
        return _some(loose and loose + beside, name, "weights beside its folders", files)
    if len(loose) > _MANY or (len(loose) > 1 and any(_is_gguf(file) for file in loose)):
        raise RequestError(
            "the repository has many files of weights; say which",
            seen=f"{name}: {', '.join(file.path for file in loose[:_MANY])}",
            hint=f"--include '{loose[0].path}'",
        )
    small = [file for file in files if file.path.endswith((".json", ".model", ".txt"))]
    chosen = [file for file in files if _is_weights(file.path) and not _is_variant(file.path)]
    return _some(chosen and chosen + small, name, "weights in safetensors or GGUF", files)


def _diffusers(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """Return what diffusers' pipeline reads: of each folder the plain variant."""
    return [
        file
        for file in files
        if file.path in _ROOT_FILES
        or (
            file.path.count("/") == 1
            and not _is_variant(file.path)
            and file.path.endswith((*_WEIGHTS, ".json", ".txt", ".model"))
        )
    ]


def _is_beside(file: RemoteFile) -> bool:
    """Say whether a file is in a folder of what the released files lack: encoders, tokenizers."""
    return "/" in file.path and file.path.split("/")[0] not in RELEASED_FOLDERS


def _some(
    chosen: Sequence[RemoteFile], name: str, what: str, files: Sequence[RemoteFile]
) -> list[RemoteFile]:
    if not chosen:
        raise RequestError(
            f"the repository has no {what}",
            seen=f"{name}: {', '.join(file.path for file in files[:_MANY]) or 'no files'}",
        )
    return list(chosen)


def _is_harmless(path: str) -> bool:
    """Say whether a path stays in its folder and is no program and no pickle."""
    parts = PurePosixPath(path).parts
    inside = not path.startswith("/") and ".." not in parts and "\\" not in path
    kinds = (*_WEIGHTS, ".json", ".txt", ".model")
    return inside and path.endswith(kinds) and not any(part.startswith(".") for part in parts)


def _is_weights(path: str) -> bool:
    return path.endswith(_WEIGHTS)


def _is_gguf(file: RemoteFile) -> bool:
    return file.path.endswith(".gguf")


def _is_variant(path: str) -> bool:
    return any(mark in path for mark in _VARIANT)
