"""Kernels chosen by where a tensor is: a CPU reference can be computed beside an NPU.

A package called torch_npu stands in for the real one: its kernels, as the real ones, refuse tensors
on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import danqing
from danqing.networks.of_diffusers import choose_by_tensor
from tests.marks import slow_among

if TYPE_CHECKING:
    from pathlib import Path

STAND_IN = """
def npu_rms_norm(tensor, gamma, epsilon=1e-6):
    raise RuntimeError(f"npu_rms_norm was called with a tensor on {tensor.device}")

def npu_geglu(tensor, dim=-1, approximate=1):
    raise RuntimeError(f"npu_geglu was called with a tensor on {tensor.device}")
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an importable torch_npu."""
    folder = tmp_path / "site"
    (folder / "torch_npu").mkdir(parents=True)
    (folder / "torch_npu" / "__init__.py").write_text(STAND_IN)
    (folder / "torch_npu-2.9.0.dist-info").mkdir()
    (folder / "torch_npu-2.9.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.9.0\n"
    )
    return folder


def run(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    start = f"import sys\nsys.path.insert(0, {str(site)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, check=False
    )


PAINT = """
import danqing
from PIL import Image
with danqing.open({folder!r}, device="cpu") as engine:
    image = Image.new("RGB", (64, 64), "teal")
    made = engine.generate("a cat", image=image, height=64, width=64, num_inference_steps=1)
print(made.pictures[0].pixels_sha256)
"""
STOCK = """
import torch

import danqing
from diffusers import SD3Transformer2DModel
from diffusers.utils import is_torch_npu_available
print("npu:", is_torch_npu_available())
model = SD3Transformer2DModel.from_pretrained({folder!r} + "/transformer")
model(torch.ones(1, 16, 8, 8), torch.ones(1, 5, 40), torch.ones(1, 24), torch.ones(1))
"""


@pytest.mark.parametrize("first", slow_among(["", "import torch_npu\n"], [""]))
def test_deepgen_paints_on_a_cpu_beside_torch_npu(site: Path, deepgen: Path, first: str) -> None:
    """Whether danqing can keep the library out of the way, or a program has imported it before."""
    plain = run(site.parent, PAINT.format(folder=str(deepgen)))
    beside = run(site, first + PAINT.format(folder=str(deepgen)))
    assert beside.returncode == 0, beside.stderr
    assert beside.stdout == plain.stdout


def test_unguarded_diffusers_does_not(site: Path, deepgen: Path) -> None:
    """The trap itself: if this passes some day, the guard can go."""
    stock = run(site, STOCK.format(folder=str(deepgen)))
    assert "npu: True" in stock.stdout
    assert stock.returncode != 0
    assert "npu_rms_norm was called with a tensor on cpu" in stock.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("affine", "bias"), [(True, False), (True, True), (False, False)])
def test_the_plain_norm_is_the_library_s(dtype: torch.dtype, affine: bool, bias: bool) -> None:
    from diffusers.models.normalization import RMSNorm

    layer: Any = RMSNorm(24, eps=1e-6, elementwise_affine=affine, bias=bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    layer.to(dtype)
    states = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    for given in (states, states.to(dtype)):
        theirs = layer(given)
        choose_by_tensor(layer)
        ours = layer(given)
        del layer.forward
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_the_plain_gate_is_the_library_s() -> None:
    from diffusers.models.activations import GEGLU

    layer: Any = GEGLU(8, 12)
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    theirs = layer(states)
    choose_by_tensor(torch.nn.Sequential(layer))
    assert torch.equal(layer(states), theirs)


def test_a_tensor_elsewhere_gets_the_library_s_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for one whose kernel the library knows."""
    from diffusers.models.normalization import RMSNorm

    from danqing.networks import of_diffusers

    monkeypatch.setattr(of_diffusers, "BACKENDS", {"meta": "somewhere"})
    layer: Any = RMSNorm(4, eps=1e-6)
    called: list[torch.Tensor] = []
    monkeypatch.setattr(layer, "forward", called.append)
    choose_by_tensor(layer)
    layer(torch.ones(2, 4, device="meta"))
    assert len(called) == 1
    layer(torch.ones(2, 4))
    assert len(called) == 1


def test_the_callers_diffusers_stays_as_it_is(schnell: Path) -> None:
    """A program's own pipeline gives the same bits before and after danqing, without our kernels."""
    from diffusers import FluxPipeline
    from diffusers.models.transformers import transformer_flux

    from danqing.networks.kernels import fuse

    def own_pixels() -> bytes:
        pipe = FluxPipeline.from_pretrained(schnell)
        generator = torch.Generator().manual_seed(1)
        image = pipe(
            "a cat", height=64, width=64, num_inference_steps=2, generator=generator
        ).images[0]
        data: bytes = image.tobytes()
        return data

    before = vars(transformer_flux).copy()
    expected = own_pixels()
    calls = []

    def rope(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        calls.append(states.shape)

    with danqing.open(schnell, device="cpu") as engine:
        plain = engine.generate("a cat", seed=1, height=64, width=64).image.tobytes()
        fuse(engine._residence.modules["transformer"], {"rope": rope})
        assert engine.generate("a cat", seed=1, height=64, width=64).image.tobytes() == plain
        assert calls
        count = len(calls)
        assert own_pixels() == expected  # while our transformer is there
        assert len(calls) == count
    assert {
        name: value for name, value in vars(transformer_flux).items() if name in before
    } == before
