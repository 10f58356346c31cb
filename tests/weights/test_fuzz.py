"""A hundred thousand mutated headers for each parser that is danqing's own: errors, nothing else."""

from __future__ import annotations

import random
import resource
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save

from danqing.errors import CheckpointError
from danqing.weights.gguf_file import GgufFile
from danqing.weights.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from danqing.weights.tensor_file import TensorFile

CASES = 100_000
QUICK = 2_000
MEMORY = Path("/dev/shm")
NUMBERS = (0, 1, 7, 8, 2**15, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1)


def safetensors_seed(_: Path) -> bytes:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    data: bytes = save(state, {"format": "pt", "note": "x" * 40})
    return data


def gguf_seed(folder: Path) -> bytes:
    path = folder / "seed.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_uint32("general.quantization_version", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("comfy.gguf.orig_shape.a.weight", [4, 8])
    writer.add_tensor("a.weight", np.zeros((4, 8), np.float32))
    data = gguf.quants.quantize(np.zeros((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """Flip, overwrite, insert, delete, repeat or cut, a few times over."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        if not data:
            break
        place = chance.randrange(len(data))
        kind = chance.randrange(7)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place] = chance.randrange(256)
        elif kind == 2:
            data[place : place + 8] = struct.pack("<Q", chance.choice(NUMBERS))
        elif kind == 3:
            data[place:place] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 9)))
        elif kind == 4:
            del data[place : place + chance.randint(1, 16)]
        elif kind == 5:
            data[place:place] = data[place : place + chance.randint(1, 64)]
        else:
            del data[place:]
    return bytes(data)


@pytest.mark.parametrize(
    "count", [QUICK, pytest.param(CASES, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
@pytest.mark.parametrize(
    ("kind", "make"), [(SafetensorsFile, safetensors_seed), (GgufFile, gguf_seed)]
)
def test_mutated_headers(kind: type[TensorFile], make: object, count: int, tmp_path: Path) -> None:
    seed = make(tmp_path)  # type: ignore[operator]
    path = (MEMORY if MEMORY.is_dir() else tmp_path) / f"danqing-fuzz-{kind.__name__}"
    chance = random.Random(7)
    sound, slowest = 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for _ in range(count):
            path.write_bytes(mutated(seed, chance))
            started = time.perf_counter()
            file = kind(path)
            try:
                for entry in file.entries.values():
                    file.read(entry)
                sound += 1
            except CheckpointError:
                pass
            finally:
                file.close()
            slowest = max(slowest, time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{kind.__name__}: {count} cases, {sound} sound, slowest {slowest:.3f} s, {grown} KiB")
    assert slowest < 2
    assert grown < 200_000
