"""LPIPS against torch's own layers, put together as the paper's package has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors.torch import save_file

from danqing.errors import CheckpointError, RequestError
from danqing.verify.lpips import lpips
from tests.conftest import call_danqing

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = (
    (0, 3, 64, 11, 4, 2),
    (3, 64, 192, 5, 1, 2),
    (6, 192, 384, 3, 1, 1),
    (8, 384, 256, 3, 1, 1),
    (10, 256, 256, 3, 1, 1),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, under the names that `lpips.LPIPS(net="alex").state_dict()` has."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (place, inner, outer, side, _, _) in enumerate(LAYERS):
        name = f"net.slice{number + 1}.{place}"
        tensors[f"{name}.weight"] = torch.randn(outer, inner, side, side, generator=generator) / (
            inner**0.5 * side
        )
        tensors[f"{name}.bias"] = torch.randn(outer, generator=generator) / 10
        tensors[f"lin{number}.model.1.weight"] = torch.rand(1, outer, 1, 1, generator=generator)
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(tensors, path)
    return path


def reference(one: Image.Image, other: Image.Image, weights: Path) -> float:
    from safetensors.torch import load_file

    tensors = {name: tensor.double() for name, tensor in load_file(weights).items()}
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)
    seen = []
    for image in (one, other):
        states = torch.from_numpy(np.array(image)).double().permute(2, 0, 1)[None] / 127.5 - 1
        states = (states - shift) / scale
        found = []
        for number, (place, _, _, _, stride, padding) in enumerate(LAYERS):
            if number in (1, 2):
                states = F.max_pool2d(states, 3, 2)
            name = f"net.slice{number + 1}.{place}"
            states = F.relu(
                F.conv2d(
                    states, tensors[f"{name}.weight"], tensors[f"{name}.bias"], stride, padding
                )
            )
            found.append(states / (states.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        seen.append(found)
    return sum(
        float(F.conv2d((a - b).pow(2), tensors[f"lin{number}.model.1.weight"]).mean())
        for number, (a, b) in enumerate(zip(*seen, strict=True))
    )


@pytest.mark.parametrize("size", [(64, 64), (97, 120), (200, 128)])
def test_it_is_the_papers(weights: Path, size: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    one, other = (
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(2)
    )
    assert lpips(one, other, weights) == pytest.approx(reference(one, other, weights), rel=1e-9)
    assert lpips(one, other, weights) == pytest.approx(lpips(other, one, weights), rel=1e-12)
    assert lpips(one, one, weights) == 0


def test_what_it_refuses(weights: Path, tmp_path: Path) -> None:
    small = Image.new("RGB", (32, 32))
    with pytest.raises(RequestError, match="LPIPS"):
        lpips(small, small, weights)
    fine = Image.new("RGB", (64, 64))
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        lpips(fine, fine, tmp_path / "no.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not the weights"):
        lpips(fine, fine, tmp_path / "other.safetensors")


def test_it_is_in_the_verdict(weights: Path) -> None:
    ran = call_danqing(
        "verify", "parity", "a boat", "--seed", 1, "--candidate", "cpu", "--lpips", weights, "-q"
    )
    assert ran.returncode == 0, ran.stderr
    assert "LPIPS 0.0000" in ran.stdout
