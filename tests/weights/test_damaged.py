"""Damaged files of every kind, made by rule: each is named for what it is, and quickly."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from typing import TYPE_CHECKING, Any

import pytest

from danqing import models
from danqing.errors import CheckpointError
from danqing.models.preflight import preflight
from tests import layouts
from tests.marks import slow_among

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHARD = "transformer/diffusion_pytorch_model.safetensors"
HUGE = 2**63


@pytest.fixture(scope="module")
def copy(schnell: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(schnell, tmp_path_factory.mktemp("damaged") / "model")


@pytest.fixture
def shard(copy: Path) -> Iterator[Path]:
    path = copy / SHARD
    sound = path.read_bytes()
    yield path
    path.unlink(missing_ok=True)
    path.write_bytes(sound)


def fault(folder: Path) -> str:
    """Return what is said of a checkpoint; fails if it is found sound, or anything else is raised."""
    try:
        checkpoint = models.open_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    found = preflight(checkpoint)
    assert not found.sound
    faults = [part.fault for part in found.findings if part.fault]
    return "\n".join(str(error) for error in (found.fault, *faults) if error)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def test_truncated_at_every_boundary(copy: Path, shard: Path) -> None:
    """At the end of the length, of the header, of every tensor, and one byte to both sides."""
    data = shard.read_bytes()
    header, rest = header_of(data)
    start = len(data) - len(rest)
    ends = {start + row["data_offsets"][1] for name, row in header.items() if name[0] != "_"}
    places = {0, 1, 7, 8, 9, start - 1, start, *ends}
    places |= {place + step for place in ends for step in (-1, 1)}
    places = {place for place in places if 0 <= place < len(data)}
    assert len(places) > 100
    for place in sorted(places):
        os.truncate(shard, 0)
        shard.write_bytes(data[:place])
        assert fault(copy), place


def test_bits_flipped_in_the_header(copy: Path, shard: Path) -> None:
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    chance = random.Random(1)
    told = 0
    for _ in range(150):
        spoiled = bytearray(data)
        spoiled[chance.randrange(8 + length)] ^= 1 << chance.randrange(8)
        shard.write_bytes(spoiled)
        try:
            checkpoint = models.open_checkpoint(copy)
            found = preflight(checkpoint)
        except CheckpointError:
            told += 1
        else:
            told += not found.sound
    assert told > 140  # a flipped bit may spare the meaning: a space, a letter of the metadata


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        header, rest = header_of(data)
        change(header)
        return with_header(header, rest)

    return apply


def first(header: dict[str, Any]) -> str:
    return next(name for name in header if name != "__metadata__")


def swap_shape(header: dict[str, Any]) -> None:
    name = next(name for name, row in header.items() if len(set(row.get("shape", []))) > 1)
    header[name]["shape"] = header[name]["shape"][::-1]


def rename(header: dict[str, Any]) -> None:
    header["odd.weight"] = header.pop(first(header))


def twice(data: bytes) -> bytes:
    header, rest = header_of(data)
    text = json.dumps(header)
    name = first(header)
    text = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}"
    return len(text).to_bytes(8, "little") + text.encode() + rest


def deep(data: bytes) -> bytes:
    text = b'{"a":' * 200_000
    return len(text).to_bytes(8, "little") + text + data


RULES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a shape with its sides swapped": (changed(swap_shape), "wrong shape"),
    "a tensor under another name": (changed(rename), "missing"),
    "a tensor twice": (twice, "twice"),
    "a tensor of whole numbers": (
        changed(lambda h: h[first(h)].update(dtype="I32")), "of dtype I32",
    ),
    "an unknown dtype": (changed(lambda h: h[first(h)].update(dtype="F3")), "impossible tensor"),
    "a negative offset": (
        changed(lambda h: h[first(h)].update(data_offsets=[-4, 0])), "impossible tensor",
    ),
    "an offset beyond all": (
        changed(lambda h: h[first(h)].update(data_offsets=[HUGE, HUGE + 4])), "impossible tensor",
    ),
    "a shape beyond all": (
        changed(lambda h: h[first(h)].update(shape=[HUGE, HUGE])), "impossible tensor",
    ),
    "overlapping tensors": (
        changed(lambda h: [row.update(data_offsets=[0, row["data_offsets"][1] - row["data_offsets"][0]])
                           for name, row in h.items() if name != "__metadata__"] and None),
        "overlap",
    ),
    "a header of 2^63 bytes": (lambda data: struct.pack("<Q", HUGE) + data[8:], "cut short"),
    "a deep header": (deep, "not valid JSON"),
    "a header that is a list": (lambda data: with_header([1], header_of(data)[1]), ""),
    "a million tensors": (
        lambda _: with_header(
            {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**6)}, b""
        ),
        "too many tensors",
    ),
    "a pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "a page": (lambda _: b"<html><body>Please log in</body></html>", "web page"),
    "an error in JSON": (lambda _: b'{"error": "Repository not found"}', ""),
    "a pickle": (lambda _: b"PK\x03\x04" + bytes(100), "pickle"),
    "zeros": (lambda data: bytes(len(data)), ""),
    "nothing": (lambda _: b"", "empty or cut short"),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", slow_among(RULES, ["a million tensors"]))
def test_a_rule(copy: Path, shard: Path, kind: str) -> None:
    change, words = RULES[kind]
    shard.write_bytes(change(shard.read_bytes()))
    assert words in fault(copy)


def test_a_link_out_of_the_folder_is_followed_but_an_index_may_not_name_one(
    copy: Path, shard: Path, tmp_path: Path
) -> None:
    """A hub's cache is made of links; a name with a path in it is somebody's trick."""
    outside = tmp_path / "outside.safetensors"
    shutil.move(shard, outside)
    shard.symlink_to(outside)
    assert preflight(models.open_checkpoint(copy)).sound
    index = shard.with_name(f"{shard.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"a": "../../outside.safetensors"}}))
    try:
        assert "outside its folder" in fault(copy)
    finally:
        index.unlink()


@pytest.fixture(scope="module")
def gguf_folder(schnell: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    state = layouts.states(schnell)["transformer"]
    layouts.write_gguf(folder / "x.gguf", "flux", state, "Q8_0")
    return folder


GGUF_RULES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "absurd count of tensors": (
        lambda data: data[:8] + struct.pack("<Q", HUGE) + data[16:], "more than the file holds",
    ),
    "absurd count of pairs": (
        lambda data: data[:16] + struct.pack("<Q", HUGE) + data[24:], "more than the file holds",
    ),
    "a key of 2^63 bytes": (
        lambda data: data[:24] + struct.pack("<Q", HUGE) + data[32:], "impossibly long",
    ),
    "version 9": (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "version 9"),
    "half": (lambda data: data[: len(data) // 2], "cut short"),
    "a header alone": (lambda data: data[:24], "more than the file holds"),
    "nothing behind the word": (lambda _: b"GGUF", "cut short"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GGUF_RULES)
def test_a_gguf_rule(gguf_folder: Path, tmp_path: Path, kind: str) -> None:
    change, words = GGUF_RULES[kind]
    path = tmp_path / "x.gguf"
    path.write_bytes(change((gguf_folder / "x.gguf").read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        models.open_checkpoint(path)
    assert words in str(caught.value)
