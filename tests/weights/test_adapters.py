"""An adapter counts on every stored dtype, or it would be dropped in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from danqing.weights.checkpoint import Adapter, Component
from danqing.weights.files import open_tensors

if TYPE_CHECKING:
    from pathlib import Path

ROWS, COLUMNS, RANK, SCALE = 48, 32, 4, 0.5


@pytest.fixture
def component(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Component, torch.Tensor]:
    """A component with one adapted weight, and the merged weight in float64 by plain torch."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=draw)
    low = torch.randn(RANK, COLUMNS, generator=draw)
    high = torch.randn(ROWS, RANK, generator=draw)
    tensors, exact = stored(request.param, weight)
    save_file(tensors, tmp_path / "base.safetensors")
    save_file({"low": low, "high": high}, tmp_path / "adapter.safetensors")
    file = open_tensors(tmp_path / "adapter.safetensors")
    adapter = Adapter(
        file=file, low=file.entries["low"], high=file.entries["high"], turned=False, scale=SCALE
    )
    found = Component(
        name="transformer", style="diffusers", folder=tmp_path,
        files=(tmp_path / "base.safetensors",), adapters={"layer.weight": adapter},
    )  # fmt: skip
    return found, exact.double() + SCALE * high.double() @ low.double()


def stored(kind: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight as a file holds it, and the numbers that stand there."""
    if kind == "fp8":
        narrow = weight.to(torch.float8_e4m3fn)
        return {"layer.weight": narrow}, narrow.float()
    if kind == "scaled fp8":
        narrow, scale = (weight / 0.01).to(torch.float8_e4m3fn), torch.tensor(0.01)
        return {"layer.weight": narrow, "layer.scale_weight": scale}, narrow.float() * scale
    if kind == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        narrow = (weight / scale).round().to(torch.int8)
        return {"layer.weight": narrow, "layer.weight_scale": scale}, narrow.float() * scale
    plain = weight.to(getattr(torch, kind))
    return {"layer.weight": plain}, plain.float()


@pytest.mark.parametrize(
    "component", ["float32", "bfloat16", "fp8", "scaled fp8", "int8"], indirect=True
)
def test_an_adapter_is_added(component: tuple[Component, torch.Tensor]) -> None:
    part, merged = component
    plain = part.read("layer.weight", 0, None, torch.float32).double()
    rounding = 0.02 if part.entries["layer.weight"].dtype == "BF16" else 1e-5
    assert (plain - merged).abs().max() < rounding * merged.abs().max()
    some = part.read("layer.weight", 8, 20, torch.float32)
    assert torch.equal(some.double(), plain[8:20])
    assert part.row_scales("layer.weight", 0, ROWS) is None  # the bytes are not the weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "component", ["float32", "bfloat16", "fp8", "scaled fp8", "int8"], indirect=True
)
def test_streamed_bytes_become_what_is_read(
    component: tuple[Component, torch.Tensor], dtype: torch.dtype
) -> None:
    part, _ = component
    span = part.span("layer.weight", 0, ROWS)
    assert span
    data = torch.frombuffer(bytearray(span.path.read_bytes()), dtype=torch.uint8)
    found = part.decode("layer.weight", data[span.start : span.stop], (0, ROWS), dtype)
    assert torch.equal(found.to(dtype), part.read("layer.weight", 0, ROWS, dtype).to(dtype))


@pytest.mark.parametrize("component", ["fp8", "scaled fp8", "int8"], indirect=True)
def test_the_merged_weight_is_not_rounded_to_bytes_again(
    component: tuple[Component, torch.Tensor],
) -> None:
    part, merged = component
    for dtype in (None, torch.float32, torch.bfloat16):
        found = part.read("layer.weight", dtype=dtype)
        assert found.dtype is (dtype or torch.float32)
        assert (found.double() - merged).abs().max() < 0.005 * merged.abs().max()
