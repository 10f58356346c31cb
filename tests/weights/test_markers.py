"""ComfyUI's markers are read: what they say of a layer is applied, or the file is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from danqing.errors import CheckpointDamagedError, UnknownModelError
from danqing.models import open_checkpoint
from danqing.weights.checkpoint import Component

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {
    "I8": torch.ones(4, 4, dtype=torch.int8),
    "F8_E4M3": torch.ones(4, 4).to(torch.float8_e4m3fn),
    "F8_E5M2": torch.ones(4, 4).to(torch.float8_e5m2),
}


def component(
    folder: Path, dtype: str, marker: Any, where: str, *, prefix: str = "", layer: str = "block.0"
) -> Component:
    """A component with one quantised layer, marked by a tensor or in the header."""
    tensors = {
        f"{prefix}{layer}.weight": WEIGHTS[dtype],
        f"{prefix}{layer}.weight_scale": torch.tensor(1.0),
    }
    metadata = None
    text = marker if isinstance(marker, str) else json.dumps(marker)
    if where == "tensor":
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        tensors[f"{prefix}{layer}.comfy_quant"] = data
    else:
        name = f"{prefix}{layer}" if where == "header" else layer
        layers = marker if isinstance(marker, str) else json.dumps({"layers": {name: marker}})
        metadata = {"_quantization_metadata": layers}
    save_file(tensors, folder / "model.safetensors", metadata)
    return Component(
        name="transformer", style="bfl", folder=folder, files=(folder / "model.safetensors",),
        prefix=prefix,
    )  # fmt: skip


PLACES = [("tensor", ""), ("header", ""), ("header", "model.diffusion_model."),
          ("header without prefix", "model.diffusion_model."), ("tensor", "model.diffusion_model.")]  # fmt: skip


@pytest.mark.parametrize(("where", "prefix"), PLACES)
@pytest.mark.parametrize(
    ("dtype", "marker"),
    [
        ("I8", {"format": "int8_tensorwise"}),
        ("I8", {"format": "int8_tensorwise", "convrot": False, "per_row": True}),
        ("F8_E4M3", {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}),
        ("F8_E4M3", {"format": "float8_e4m3fn", "orig_dtype": "bfloat16", "orig_shape": [4, 4]}),
        ("F8_E5M2", {"format": "float8_e5m2", "params": {}}),
    ],
)
def test_plain_formats_are_read(
    dtype: str, marker: Any, where: str, prefix: str, tmp_path: Path
) -> None:
    part = component(tmp_path, dtype, marker, where, prefix=prefix)
    assert list(part.entries) == ["block.0.weight"]
    assert torch.equal(part.read("block.0.weight"), torch.ones(4, 4))


@pytest.mark.parametrize(("where", "prefix"), PLACES)
@pytest.mark.parametrize(
    ("marker", "named"),
    [
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}, "convrot"),
        ({"format": "int8_tensorwise", "params": {"convrot": True}}, "convrot"),
        ({"format": "convrot_w4a4"}, "convrot_w4a4"),
        ({"format": "asym_w4a8_int8", "group_size": 16}, "asym_w4a8_int8"),
        ({"format": "mxfp8"}, "mxfp8"),
        ({"format": "nvfp4"}, "nvfp4"),
        ({"format": "int8_blockwise"}, "int8_blockwise"),
        ({"format": "int8_tensorwise", "twisted": 3}, "twisted"),
        ({"format": ["int8_tensorwise"]}, "int8_tensorwise"),
        ({}, "None"),
    ],
)
def test_what_is_not_applied_is_refused_by_name(
    marker: Any, named: str, where: str, prefix: str, tmp_path: Path
) -> None:
    part = component(tmp_path, "I8", marker, where, prefix=prefix)
    with pytest.raises(UnknownModelError, match="which danqing does not read") as caught:
        _ = part.entries
    assert named in caught.value.what


@pytest.mark.parametrize("marker", ["{", "[]", "7", '{"format": "float8_e4m3fn"}', "[" * 5000])
@pytest.mark.parametrize("where", ["tensor", "header"])
def test_a_broken_marker_is_an_error(marker: str, where: str, tmp_path: Path) -> None:
    """Of these the fourth is right, but not for a weight in int8, nor as a header."""
    with pytest.raises(CheckpointDamagedError):
        _ = component(tmp_path, "I8", marker, where).entries


def test_a_header_may_speak_of_other_components(tmp_path: Path) -> None:
    text = json.dumps({"layers": {"text_encoders.t5.block.9": {"format": "nvfp4"}}})
    part = component(tmp_path, "I8", text, "header")
    assert list(part.entries) == ["block.0.weight"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer_blocks.0.attn.qkv_proj.qweight", "nunchaku"),
        ("transformer_blocks.0.attn.to_q.weight._data", "quanto"),
        ("transformer_blocks.0.attn.to_q._weight_qdata", "torchao"),
        ("transformer_blocks.0.attn.to_q.weight.absmax", "bitsandbytes"),
    ],
)
def test_other_tools_files_are_named(name: str, kind: str, tmp_path: Path) -> None:
    """Also where no tensor tells which model it is."""
    save_file({name: torch.zeros(4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownModelError, match=kind):
        open_checkpoint(tmp_path / "model.safetensors")
