"""What ComfyUI's files say of how a layer is stored: a tensor beside it, or the file's header.

Two files may have the same names, shapes and dtypes and mean different weights: a matrix that was
rotated before it was rounded to int8 (ConvRot) says so only in its marker. Read as plain int8 it
gives noise. So every marker is read, and a format or flag that danqing does not apply is refused.

The markers are those of ComfyUI's `comfy/ops.py` and of comfy-kitchen, as of 2026-11: a tensor
`LAYER.comfy_quant` of bytes, JSON such as `{"format": "float8_e4m3fn"}`; or in the header
`_quantization_metadata`, JSON `{"layers": {LAYER: {"format": ...}}}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing.errors import CheckpointDamagedError, UnknownModelError
from danqing.files import open_regular
from danqing.weights.json_file import parse_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from danqing.weights.tensor_file import TensorEntry, TensorFile

MARKER = ".comfy_quant"
_HEADER = "_quantization_metadata"
_APPLIED = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
"""Formats that danqing reads, and the dtype of their weights."""
_HARMLESS = frozenset({
    "format", "params",
    "full_precision_matrix_mult",  # how the layer multiplies; danqing widens its weights anyway
    "orig_dtype", "orig_shape", "per_row",  # the tensors themselves tell
    "convrot_groupsize",  # counts only with convrot, which is refused
})  # fmt: skip
_MAX_BYTES = 2**16
"""Of one marker; those seen have fewer than 200."""


def check_markers(
    files: Mapping[Path, TensorFile], entries: Mapping[str, TensorEntry], prefix: str = ""
) -> None:
    """Refuse layers that are stored in a way danqing does not undo.

    Args:
        files: a component's files, by path.
        entries: its tensors, without the prefix.
        prefix: what their names begin with in the files.

    Raises:
        UnknownModelError: a format or a flag is not known; it is named.
        CheckpointDamagedError: a marker cannot be read, or contradicts its weight.
    """
    for layer, marker, where in (*_beside(entries), *_in_headers(files, entries, prefix)):
        _check(marker, entries.get(f"{layer}.weight"), where)


def _beside(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Any, str]]:
    """Yield each marked layer's name, its marker, and where that stands, of marker tensors."""
    marked: dict[Path, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        if name.endswith(MARKER):
            marked.setdefault(entry.file, {})[name.removesuffix(MARKER)] = entry
    for path, found in marked.items():
        try:
            with open_regular(path) as file:
                for layer, entry in found.items():
                    file.seek(entry.start)
                    where = f"{path}: {entry.name}"
                    text = file.read(min(entry.size_bytes, _MAX_BYTES + 1))
                    yield layer, _parse(text, where), where
        except OSError as error:
            raise CheckpointDamagedError(
                "the file cannot be read", seen=f"{path} ({error.strerror or error})"
            ) from error


def _in_headers(
    files: Mapping[Path, TensorFile], entries: Mapping[str, TensorEntry], prefix: str
) -> Iterator[tuple[str, Any, str]]:
    """Yield the same of markers in the files' headers."""
    for path, reader in files.items():
        header = reader.metadata.get(_HEADER)
        if header is None:
            continue
        where = f"{path}: {_HEADER}"
        table = _parse(str(header).encode(), where)
        layers = table.get("layers")
        if not isinstance(layers, dict):
            raise _damaged(where, "a table of layers")
        for layer, marker in layers.items():
            own = layer.removeprefix(prefix)
            if f"{own}.weight" in entries:  # the file may hold other components, too
                yield own, marker, f"{where}: {layer}"


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_table(text)
    except ValueError as error:
        raise _damaged(where, "a JSON table") from error


def _check(marker: Any, weight: TensorEntry | None, where: str) -> None:
    if not isinstance(marker, dict):
        raise _damaged(where, "a table")
    inner = marker.get("params")
    flags = {**(inner if isinstance(inner, dict) else {}), **marker}
    kind = str(flags.get("format"))
    if kind not in _APPLIED:
        raise _unknown(f"the format {kind}", where)
    for name, value in flags.items():
        if name not in _HARMLESS and value:
            raise _unknown(f"{kind} with {name}", where)
    if weight is not None and weight.dtype != _APPLIED[kind]:
        raise CheckpointDamagedError(
            "a weight is not stored as its marker says",
            seen=f"{where}: {kind}, but {weight.name} is {weight.dtype}",
            hint="the file was changed after it was quantised; take it from its source again",
        )


def _unknown(what: str, where: str) -> UnknownModelError:
    return UnknownModelError(
        f"the weights are stored in {what}, which danqing does not read",
        seen=where,
        allowed=", ".join(_APPLIED),
        hint="take a file of this model in bfloat16, fp8, plain int8 or GGUF",
    )


def _damaged(where: str, wanted: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        "a marker of how weights are stored cannot be read", seen=where, allowed=wanted
    )
