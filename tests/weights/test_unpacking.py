"""Weights in fewer bits come out with the bits that their formats' own libraries give."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from danqing.weights import unpacking
from danqing.weights.gguf_file import QUANTISED, TYPES

RNG = np.random.default_rng(0)
KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
BY_LIBRARY = {"IQ4_NL", "IQ4_XS"}


@pytest.mark.parametrize("name", sorted(QUANTISED))
def test_blocks_are_gguf_s(name: str) -> None:
    """Every bit pattern of a block: of a file that is damaged too."""
    number, elements, size = next((n, e, s) for n, (k, e, s) in TYPES.items() if k == name)
    data = RNG.integers(0, 256, (999, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(dequantize(data, gguf.GGMLQuantizationType(number))).reshape(-1)
    packed = torch.from_numpy(data).reshape(-1)
    for dtype in torch.float32, torch.bfloat16:
        ours = unpacking.by_block(packed, number, elements, len(data), dtype)
        if name in BY_LIBRARY:
            assert ours is None
            continue
        assert ours is not None
        assert ours.dtype is dtype
        assert torch.equal(ours.nan_to_num(), theirs.to(dtype).nan_to_num())
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_are_torch_s(
    kind: str, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(unpacking, "compiled", lambda _: None)
    data = torch.from_numpy(RNG.integers(0, 256, (7, 300), dtype=np.uint8))
    wide = data.view(KINDS[kind]).float()
    one, rows = torch.tensor(0.37), torch.rand(7) + 0.01
    for scales, truth in (None, wide), (one, wide * one), (rows, wide * rows[:, None]):
        found = unpacking.by_table(data.reshape(-1), kind, (7, 300), scales, dtype)
        assert found.dtype is dtype
        assert torch.equal(found.nan_to_num(), truth.to(dtype).nan_to_num())
        assert torch.equal(found.isnan(), truth.isnan())


def test_of_other_shapes() -> None:
    data = torch.arange(24, dtype=torch.uint8)
    for shape in ((), (24,), (2, 3, 2, 2)):
        count = max(1, int(np.prod(shape)))
        found = unpacking.by_table(data[:count], "I8", shape, None, torch.float32)
        assert found.shape == shape
        assert torch.equal(found.reshape(-1), data[:count].float())
    scales = torch.rand(24)
    found = unpacking.by_table(data, "I8", (24,), scales, torch.float32)
    assert torch.equal(found, data.float() * scales)
    found = unpacking.by_table(data[::2], "I8", (3, 4), None, torch.bfloat16)
    assert torch.equal(found.reshape(-1), data[::2].bfloat16())
