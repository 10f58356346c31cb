"""A trace: the tensors at the joints of one run, in order, in a file that travels.

The file is a safetensors file: any reader of those can open it. Its metadata say what ran where; a
trace of digests alone has no tensors. Two traces are compared without the model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from danqing.arrays import BITS, Array
from danqing.atomic import write_whole
from danqing.errors import OutputError, TraceError
from danqing.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

SCHEMA = 1
KEY = "danqing.trace"
_CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
_NAMES = {name: code for code, name in _CODES.items()}
_MAX_HEADER_BYTES = 100_000_000
_MAX_VALUES = 6_000_000
"""In a header; each tensor has a dozen of about eight bytes or more."""
_MAX_SIDES, _MAX_SIDE, _LONGEST = 8, 2**40, 4096


@dataclass(frozen=True, kw_only=True)
class Joint:
    """One tensor of a trace.

    Attributes:
        name: `encode/...`, `draw/...`, `denoise/STEP/...` or `decode/...`.
        dtype: PyTorch's name.
        shape: sides.
        sha256: digest of dtype, shape and bytes.
        start: its first byte in the file; None in a trace of digests.
        sample: how many of its values were kept, evenly spread; None if all were.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    start: int | None = None
    sample: int | None = None

    @property
    def stage(self) -> str:
        """The part of the run it belongs to."""
        return self.name.split("/")[0]

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Sides of what is in the file: of a sample, its length."""
        return self.shape if self.sample is None else (self.sample,)

    @property
    def size_bytes(self) -> int:
        """Bytes of it in the file."""
        return math.prod(self.kept_shape) * int(BITS[self.dtype][-1])


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a run showed.

    Attributes:
        joints: in the order they came.
        about: request, provenance and stages, as in a picture's record.
        path: the file it was read from.
    """

    joints: Mapping[str, Joint]
    about: Mapping[str, Any]
    path: Path

    def read(self, name: str) -> Array | None:
        """Return a tensor, or the sample that was kept of it; None if only its digest was."""
        joint = self.joints[name]
        if joint.start is None:
            return None
        count = math.prod(joint.kept_shape)
        bits = np.fromfile(self.path, BITS[joint.dtype], count=count, offset=joint.start)
        return Array(joint.dtype, bits.reshape(joint.kept_shape))


class Recorder:
    """Keeps what a run shows: everything, streamed to a file, or samples, or digests alone.

    Called with each tensor; as a context manager it writes the file when the work is done, and
    leaves nothing if it fails.
    """

    def __init__(self, path: Path, *, digests: bool = False, sample: int | None = None) -> None:
        """Record to a file.

        Args:
            path: the file.
            digests: keep the digests of the tensors alone.
            sample: keep at most so many values of each tensor from inside a network.
        """
        self.joints: dict[str, Joint] = {}
        self._path = path
        self._digests = digests
        self._sample = sample
        self._spool: Any = None

    def __enter__(self) -> Self:
        """Open a temporary file beside the target."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._spool = tempfile.TemporaryFile(dir=self._path.parent)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the temporary file go."""
        self._spool.close()

    def __call__(self, name: str, array: Array) -> None:
        """Keep one tensor."""
        start, kept = None, self._kept(name, array)
        if not self._digests:
            start = self._spool.tell()
            try:
                self._spool.write(kept.data())
            except OSError as error:
                raise _unwritable(self._path, error) from error
        self.joints[name] = Joint(
            name=name,
            dtype=array.dtype,
            shape=array.shape,
            sha256=array.sha256,
            start=start,
            sample=None if kept is array else kept.bits.size,
        )

    def _kept(self, name: str, array: Array) -> Array:
        size = array.bits.size
        if self._sample is None or size <= self._sample or not name.startswith("inside/"):
            return array
        places = np.linspace(0, size - 1, self._sample).astype(np.int64)
        return Array(array.dtype, array.bits.reshape(-1)[places])

    def finish(self, about: Mapping[str, Any]) -> Trace:
        """Write the file, whole or not at all, and return the trace."""
        header = _header(self.joints, about)
        try:
            with write_whole(self._path) as file:
                file.write(len(header).to_bytes(8, "little") + header)
                self._spool.seek(0)
                shutil.copyfileobj(self._spool, file)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        return read_trace(self._path)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError("the trace cannot be written", seen=f"{path} ({error.strerror or error})")


def _header(joints: Mapping[str, Joint], about: Mapping[str, Any]) -> bytes:
    rows = [
        {
            "name": one.name,
            "dtype": one.dtype,
            "shape": list(one.shape),
            "sha256": one.sha256,
            **({} if one.sample is None else {"sample": one.sample}),
        }
        for one in joints.values()
    ]
    told = json.dumps({"schema": SCHEMA, "joints": rows, "about": about}, ensure_ascii=False)
    table: dict[str, Any] = {"__metadata__": {KEY: told}}
    for one in joints.values():
        if one.start is not None:
            table[one.name] = {
                "dtype": _NAMES[one.dtype],
                "shape": list(one.kept_shape),
                "data_offsets": [one.start, one.start + one.size_bytes],
            }
    # a file name that is not UTF-8 has surrogates, which JSON can only escape
    text = json.dumps(table, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return text + b" " * (-len(text) % 8)


def read_trace(path: Path) -> Trace:
    """Open a trace; its tensors are read when they are asked for.

    Raises:
        TraceError: it is no trace, it is damaged, or of another schema.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
                raise TraceError("this is no trace, or it is cut short", seen=path)
            header = file.read(length)
        table = _parsed(header)
        told = _parsed(table["__metadata__"][KEY].encode())
        joints = [_joint(row, table, 8 + length, size) for row in told["joints"]]
        about = dict(told["about"])
    except OSError as error:
        reason = error.strerror or error
        raise TraceError("the trace cannot be read", seen=f"{path}: {reason}") from error
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    except RecursionError as error:
        raise _damaged(path, error) from error
    if told.get("schema") != SCHEMA:
        raise TraceError(
            "the trace was written by another version of danqing",
            seen=f"{path}: schema {str(told.get('schema'))[:40]}",
            allowed=f"schema {SCHEMA}",
        )
    return Trace(joints={joint.name: joint for joint in joints}, about=about, path=path)


def _damaged(path: Path, error: Exception) -> TraceError:
    return TraceError(
        "this is no trace, or it is damaged",
        seen=f"{path}: {type(error).__name__}: {str(error)[:120]}",
        hint="danqing trace writes one",
    )


def _parsed(data: bytes) -> Any:
    """Parse JSON, unless it has so many values that they would not fit into memory."""
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > _MAX_VALUES:
        msg = f"its header has {values} values"
        raise ValueError(msg)
    return json.loads(data)


def check_about(trace: Trace) -> None:
    """See that a trace says what ran where: the fields that others read, each of its type.

    Raises:
        TraceError: a field is missing, or of another type.
    """
    try:
        origin = trace.about["provenance"]
        device, model = origin["device"], origin["model"]
        texts = {
            "dtype": origin["dtype"],
            "device.name": device["name"],
            "device.chip": device["chip"],
            "model.title": model["title"],
            "model.fingerprint": model["fingerprint"],
        }
        for name, text in texts.items():
            if not isinstance(text, str) or len(text) > _LONGEST:
                msg = f"{name} is {type(text).__name__}"
                raise TypeError(msg)  # noqa: TRY301
        dict(trace.about["request"]).items()
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged(trace.path, error) from error


def _joint(row: Mapping[str, Any], table: Mapping[str, Any], base: int, size: int) -> Joint:
    entry = table.get(row["name"])
    joint = Joint(
        name=str(row["name"]),
        dtype=str(row["dtype"]),
        shape=tuple(int(side) for side in row["shape"]),
        sha256=str(row["sha256"]),
        start=None if entry is None else base + int(entry["data_offsets"][0]),
        sample=None if row.get("sample") is None else int(row["sample"]),
    )
    sides = joint.kept_shape
    known = joint.dtype in BITS and len(joint.shape) <= _MAX_SIDES
    if not known or not all(0 <= side <= _MAX_SIDE for side in (*joint.shape, *sides)):
        msg = f"{joint.name} is {joint.dtype} {list(joint.shape[:_MAX_SIDES])}"
        raise ValueError(msg)
    if joint.start is not None and not base <= joint.start <= size - joint.size_bytes:
        msg = f"{joint.name} lies beyond the end"
        raise ValueError(msg)
    return joint
