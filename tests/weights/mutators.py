"""Seeded damage of a model folder: one file of it at a time, in every way its kind can be wrong."""

from __future__ import annotations

import json
import os
import random
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

VALUES: tuple[Any, ...] = (
    0, 1, -1, 3, 10_000, 10**9, 10**12, 2**63, 10**38, 0.0, 0.5, -1.5, 1e300, True, False, None, "",
    "x", "../../../etc/passwd", "evil/repo", [], [0], [10**9], [[1] * 5], {}, {"a": 1},
    "\x1b]0;x\x07", "\u202e", [None, None, None], "9" * 5000,
)  # fmt: skip
"""In place of any value of a config."""
TEXTS = (
    "NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "9" * 5000, "-" + "9" * 5000,
    '"\\ud800"', "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "",
)  # fmt: skip
"""In place of any value, as JSON spells them, or should not."""
CODE = {
    "_attn_implementation": "evil/repo", "attn_implementation": "flash_attention_2",
    "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, "trust_remote_code": True,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "custom_pipelines": "evil", "_commit_hash": "0" * 40, "use_kernels": True, "dtype": "evil",
    "torch_dtype": "os.system", "architectures": ["evil.Model"], "model_type": "llama",
    "tokenizer_class": "evil.Tokenizer", "_class_name": "os.system", "unknown_key": 7,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kind of damage.

    Attributes:
        name: which file, and what is done to it.
        path: of the file.
        apply: does it.
    """

    name: str
    path: Path
    apply: Callable[[Path], object]


def cases(folder: Path, seed: int) -> list[Case]:
    """Return the damages of every file of a folder, in an order that the seed decides."""
    chance = random.Random(seed)
    found: list[Case] = []
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = str(path.relative_to(folder))
        found += [Case(f"{name}: {what}", path, apply) for what, apply in _any_file(chance)]
        if path.suffix == ".json":
            table = json.loads(path.read_text("utf-8"))
            found += [
                Case(f"{name}: {what}", path, apply) for what, apply in _json_file(table, chance)
            ]
        elif path.suffix == ".safetensors":
            found += [Case(f"{name}: {what}", path, apply) for what, apply in _tensors(chance)]
    chance.shuffle(found)
    return found


Damage = tuple[str, "Callable[[Path], object]"]


def _any_file(chance: random.Random) -> Iterator[Damage]:
    """Yield what can be wrong with any file."""
    yield "missing", lambda path: path.unlink()
    yield "empty", lambda path: path.write_bytes(b"")
    yield "a named pipe", lambda path: _replace(path, os.mkfifo)
    yield "a folder", lambda path: _replace(path, lambda place: place.mkdir())
    yield "a link to itself", lambda path: _replace(path, lambda place: place.symlink_to(place))
    yield "a device", lambda path: _replace(path, lambda place: place.symlink_to("/dev/zero"))
    yield "sparse", lambda path: os.truncate(path, 2**34)
    for _ in range(4):
        yield "cut", _edit(lambda data, place: data[:place], chance)
        yield "a flipped bit", _edit(_flip, chance)
        yield "random bytes", _edit(_overwrite, chance)


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


def _edit(change: Callable[[bytes, int], bytes], chance: random.Random) -> Callable[[Path], None]:
    share = chance.random() ** 3  # headers and small values come first

    def apply(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(change(data, int(share * len(data))))

    return apply


def _flip(data: bytes, place: int) -> bytes:
    out = bytearray(data or b"\0")
    out[min(place, len(out) - 1)] ^= 1 << place % 8
    return bytes(out)


def _overwrite(data: bytes, place: int) -> bytes:
    return data[:place] + random.Random(place).randbytes(16) + data[place + 16 :]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the places of a config, of long tables and lists the first few."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in list(value)[:60]:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 2)):
            yield from _places(value[index], (*path, index))


def _json_file(table: Any, chance: random.Random) -> Iterator[Damage]:
    for place in _places(table):
        for value in chance.sample(VALUES, 2):
            yield f"{place} is {str(value)[:30]!r}", _set(place, value)
    places = list(_places(table))
    for text in TEXTS:
        place = chance.choice(places)
        yield f"{place} is {text[:12]}", _set_text(place, text)
    for key, value in CODE.items():
        yield f"{key} is added", _set((key,), value)
        inner = [path for path in places if isinstance(_at(table, path), dict)]
        if inner:
            yield f"{key} is added inside", _set((*chance.choice(inner), key), value)
    yield "a name twice", lambda path: _write(path, '{"a": 1, "a": 2}')
    yield "a list", lambda path: _write(path, "[]")
    yield "many values", lambda path: _write(path, "{" + '"a":[' + "[]," * 10**6 + "1]}")


def _at(table: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        table = table[key]
    return table


def _set(place: tuple[Any, ...], value: object) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        table = json.loads(path.read_text("utf-8"))
        _at(table, place[:-1])[place[-1]] = value
        _write(path, json.dumps(table))

    return apply


def _set_text(place: tuple[Any, ...], text: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        table = json.loads(path.read_text("utf-8"))
        _at(table, place[:-1])[place[-1]] = "<here>"
        _write(path, json.dumps(table).replace('"<here>"', text))

    return apply


def _write(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _tensors(chance: random.Random) -> Iterator[Damage]:
    rows: tuple[tuple[str, Any], ...] = (
        ("a huge shape", {"shape": [2**62, 2**62]}), ("many sides", {"shape": [1] * 100_000}),
        ("a zero side", {"shape": [2**32] * 50_000 + [0], "data_offsets": [0, 0]}),
        ("no shape", {"shape": None}), ("a float side", {"shape": [1.5]}),
        ("another dtype", {"dtype": "I64"}), ("no dtype", {"dtype": "X"}),
        ("a negative start", {"data_offsets": [-8, 8]}), ("no end", {"data_offsets": [0]}),
    )  # fmt: skip
    for what, change in rows:
        yield what, _header(_change(change))
    yield "a tensor gone", _header(lambda header: header.pop(_some(header)))
    yield (
        "a tensor more",
        _header(
            lambda header: header.update(x={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
        ),
    )
    yield (
        "a name with controls",
        _header(lambda header: header.update({"\x1b[31m\u202e": header.pop(_some(header))})),
    )
    yield (
        "many tensors",
        _header(
            lambda header: header.update(
                {
                    f"transformer_blocks.{i}.x": {
                        "dtype": "F32",
                        "shape": [0],
                        "data_offsets": [0, 0],
                    }
                    for i in range(200_000)
                }
            )
        ),
    )
    yield (
        "many blocks",
        _header(
            lambda header: header.update(
                {
                    f"{stem}{i}.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                    for i in range(4000)
                    for stem in ("transformer_blocks.", "double_blocks.", "encoder.block.")
                }
            )
        ),
    )
    for length in (2**63, 2**40, 0, chance.randrange(1000)):
        yield f"a header of {length}", _length(length)


def _change(change: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[_some(header)].update(change)


def _length(length: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def _some(header: dict[str, Any]) -> str:
    return sorted(name for name in header if name != "__metadata__")[len(header) // 3]


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply
