"""Headers and indexes as an enemy, or a bad disk, would write them: an error, in bounded time."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from danqing import models
from danqing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    DanqingError,
    RequestError,
    UnsafeFileError,
)
from danqing.models import open_checkpoint
from danqing.models.preflight import preflight
from danqing.request import Request
from danqing.weights import digests, places
from danqing.weights.gguf_file import GgufFile
from danqing.weights.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

SOUND = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
SLOW = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def entries(path: Path, data: bytes) -> Mapping[str, Any] | None:
    path.write_bytes(data)
    try:
        return SafetensorsFile(path).entries
    except CheckpointError:
        return None


def test_a_sound_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    found = entries(path, SOUND)
    assert found is not None
    with safe_open(path, framework="pt") as file:
        assert set(found) == set(file.keys())
        for name, entry in found.items():
            assert entry.shape == tuple(file.get_slice(name).get_shape())


@SLOW
@given(st.data())
def test_flipped_bytes_are_never_more_than_an_error(tmp_path: Path, data: st.DataObject) -> None:
    spoiled = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.safetensors"
    found = entries(path, bytes(spoiled))
    if found is not None:  # what we let pass, the library reads too
        with safe_open(path, framework="pt") as file:
            assert set(found) == set(file.keys())


@SLOW
@given(st.integers(0, len(SOUND) - 1))
def test_every_truncation_is_noticed(tmp_path: Path, length: int) -> None:
    assert entries(tmp_path / "x.safetensors", SOUND[:length]) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)


@SLOW
@given(JSON)
def test_any_json_header(tmp_path: Path, value: Any) -> None:
    text = json.dumps(value).encode()
    found = entries(tmp_path / "x.safetensors", len(text).to_bytes(8, "little") + text)
    assert not found


@SLOW
@given(JSON)
def test_any_json_for_model_index(tmp_path: Path, value: Any) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(value))
    try:
        open_checkpoint(tmp_path)
    except DanqingError:
        return


@SLOW
@given(st.dictionaries(st.sampled_from([*Request.model_fields, "other"]), JSON, max_size=6))
def test_any_request(values: dict[str, Any]) -> None:
    try:
        request = Request(**values)
    except RequestError:
        return
    assert request.prompt.strip()


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model_index.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


class TooSlow(BaseException):
    """No `Exception`, which code under test may handle."""


@contextmanager
def bounded(seconds: int = 10, kibibytes: int = 1 << 20) -> Iterator[None]:
    """Fail what takes longer, or more memory; half the seconds of a processor's time count."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert time.process_time() - started < seconds / 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < kibibytes


# --- headers -------------------------------------------------------------------------------------


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + data


def row(shape: object, offsets: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


HEADERS: dict[str, Callable[[], bytes]] = {
    "200,000 sides": lambda: with_header({"a": row([2**32] * 200_000 + [0])}),
    "nine sides": lambda: with_header({"a": row([1] * 9, (0, 4))}, bytes(4)),
    "a side of 2^41": lambda: with_header({"a": row([2**41, 0])}),
    "sides of 4,000 digits": lambda: with_header(
        b'{"a":{"dtype":"F32","shape":[%s,0],"data_offsets":[0,0]}}' % (b"9" * 4000)
    ),
    "1,400,000 tensors": lambda: with_header(
        b"{" + b",".join(
            b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_400_000)
        ) + b"}"
    ),
    "200,000 tensors": lambda: with_header({f"t{i}": row([0]) for i in range(200_000)}),
    "metadata of many values": lambda: with_header(
        b'{"__metadata__":{"a":[' + b"[]," * 4_000_000 + b"1]}}"
    ),
    "a deep header": lambda: with_header(b'{"a":' * 10**6),
    "a name twice": lambda: with_header(
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    ),
    "a header in UTF-16": lambda: with_header("{}".encode("utf-16")),
}  # fmt: skip


@pytest.mark.finding(7)
def test_headers_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for what, make in HEADERS.items():
        path.write_bytes(make())
        with bounded(), pytest.raises(CheckpointDamagedError):
            _ = SafetensorsFile(path).entries, what


def gguf(tensors: int, pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


TEXTS = struct.pack("<Q", 1) + b"a" + struct.pack("<II", 9, 8)
"""A key, and the beginning of an array of texts."""
GGUF_HEADERS = {
    "2^35 tensors": gguf(2**35, 0), "200,000 tensors": gguf(200_000, 0),
    "2^37 pairs": gguf(0, 2**37), "2^36 texts": gguf(0, 1, TEXTS + struct.pack("<Q", 2**36)),
    "2,000,000 texts": gguf(0, 1, TEXTS + struct.pack("<Q", 2_000_000)),
    "2^40 numbers": gguf(
        0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**40)
    ),
    "a text of 2^40 bytes": gguf(0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IQ", 8, 2**40)),
}  # fmt: skip


@pytest.mark.finding(7)
def test_gguf_headers_are_bounded_however_large_the_file_seems(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for what, data in GGUF_HEADERS.items():
        path.write_bytes(data)
        os.truncate(path, 2**41)
        assert path.stat().st_blocks * 512 < 2**20
        with bounded(), pytest.raises(CheckpointDamagedError):
            _ = GgufFile(path).entries, what


def test_an_index_of_shards_is_bounded(tmp_path: Path) -> None:
    table: Any
    (tmp_path / "model.safetensors").write_bytes(SOUND)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    index = tmp_path / "model.safetensors.index.json"
    for table in (
        {f"t{i}": "model.safetensors" for i in range(200_000)},
        {f"t{i}": f"model-{i}.safetensors" for i in range(2000)},
        {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": ".."}, {"a": ""},
        {"a": "model\x00.safetensors"}, {"a": "config.json"}, {"a": 3}, [], 3,
    ):  # fmt: skip
        index.write_text(json.dumps({"weight_map": table}))
        with bounded(), pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


# --- JSON ----------------------------------------------------------------------------------------

TEXTS_OF_JSON = {
    "NaN": b'{"a": NaN}', "infinity": b'{"a": -Infinity}', "a large float": b'{"a": 1e999}',
    "400 digits": b'{"a": 1%s}' % (b"0" * 400), "5,000 digits": b'{"a": %s}' % (b"9" * 5000),
    "half a character": b'{"a": "\\ud800"}', "half in a name": b'{"\\udfff": 1}',
    "a name twice": b'{"a": {"b": 1, "b": 2}}', "deep": b'{"a":' * 70 + b"1" + b"}" * 70,
    "very deep": b"[" * 10**6, "not UTF-8": b'{"a": "\xff"}', "a list": b"[]", "nothing": b"",
    "many values": b'{"a": [' + b"[]," * 10**6 + b"1]}",
    "large": b'{"a": "' + b"b" * 2**23 + b'"}',
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS_OF_JSON)
def test_json_that_readers_disagree_about_is_refused(what: str) -> None:
    from danqing.weights.json_file import parse_table

    with bounded(kibibytes=300_000), pytest.raises(ValueError, match=r"[a-z]"):
        parse_table(TEXTS_OF_JSON[what])


# --- files that are none -------------------------------------------------------------------------


def a_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)
        os.close(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
    "a socket": a_socket,
}


def look(folder: Path, path: Path) -> None:
    """Open a folder and check the component that a file belongs to."""
    checkpoint = open_checkpoint(folder)
    model = models.make_model(checkpoint, models.identify(checkpoint))
    for name in model.parts:
        if path.parent.name == name:
            model.check_part(name)


@pytest.mark.finding(12)
@pytest.mark.parametrize("model", ["schnell", "deepgen"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_opened(
    kind: str, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Each file of a folder in turn: nothing waits for a writer, or reads without end."""
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "m")
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        kept = path.with_name(f"{path.name}.kept")
        path.rename(kept)
        SPECIAL[kind](path)
        with bounded(seconds=20), pytest.raises(DanqingError):
            look(folder, path)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
        kept.rename(path)


@pytest.mark.finding(12)
def test_a_named_pipe_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where caches, digests and single files are looked at."""
    pipe = tmp_path / "x.safetensors"
    os.mkfifo(pipe)
    with bounded():
        with pytest.raises(CheckpointError, match="named pipe"):
            _ = SafetensorsFile(pipe).entries
        with pytest.raises(CheckpointError, match="named pipe"):
            _ = GgufFile(pipe).entries
        with pytest.raises(CheckpointError):
            digests.sha256(pipe)
        with pytest.raises(DanqingError):
            open_checkpoint(pipe)
        with pytest.raises(DanqingError):
            open_checkpoint(pipe, allow_pt=True)
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs").mkdir()
    os.mkfifo(tmp_path / "models--a--b" / "refs" / "main")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with bounded():
        assert places.find("a/b") == snapshot


def test_links_out_of_a_folder_are_followed(schnell: Path, tmp_path: Path) -> None:
    """Hubs' caches are made of them."""
    folder = tmp_path / "linked"
    for path in schnell.rglob("*"):
        place = folder / path.relative_to(schnell)
        if path.is_dir():
            place.mkdir(parents=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    checkpoint = open_checkpoint(folder)
    assert preflight(checkpoint).sound


# --- pickles -------------------------------------------------------------------------------------


@pytest.mark.finding(11)
def test_a_pickle_named_as_safetensors_is_refused_with_a_reason(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.sft"):
        path = tmp_path / name
        torch.save({"meta_queries": torch.zeros(1)}, path)
        with pytest.raises(UnsafeFileError, match="named as safetensors") as caught:
            open_checkpoint(path, allow_pt=True)
        assert caught.value.hint


@pytest.mark.finding(11)
def test_a_damaged_pickle_is_never_more_than_an_error(tmp_path: Path) -> None:
    import random

    path = tmp_path / "model.pt"
    torch.save({"meta_queries": torch.zeros(4, 4), "a": torch.ones(3)}, path)
    seeds = [path.read_bytes(), pickle.dumps({"a": [1, 2, {"b": 3}]}), b"\x80\x02.", b""]
    chance = random.Random(11)
    for _ in range(300):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(0, 3)):
            if data:
                place = chance.randrange(len(data))
                data[place : place + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 3))
        path.write_bytes(data)
        with bounded(), pytest.raises(CheckpointError):
            open_checkpoint(path, allow_pt=True)
