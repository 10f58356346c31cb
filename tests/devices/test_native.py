"""Our own kernels for CPUs: as near to the truth as torch's, in every shape they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from danqing.devices import native
from danqing.devices.native.int8 import Int8Linear
from danqing.processor import cpu_flags

needed = pytest.mark.skipif(
    not native.available(cpu_flags()), reason="this processor has no AVX512_BF16, or no g++"
)
RNG = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_WORTH", 0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RNG).bfloat16()


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.float() - truth).norm() / truth.norm())


@needed
@pytest.mark.parametrize("queries,keys", [(1, 1), (7, 65), (25, 191), (192, 192), (300, 449)])  # noqa: PT006
@pytest.mark.parametrize("width", [64, 128])
def test_attention(queries: int, keys: int, width: int) -> None:
    query = draw(2, queries, 3, width).permute(0, 2, 1, 3)
    key, value = (draw(2, keys, 3, width).permute(0, 2, 1, 3) for _ in range(2))
    found = native.attention(query, key, value, None, width**-0.5)
    truth = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    torchs = F.scaled_dot_product_attention(query, key, value)
    assert found is not None
    assert found.shape == torchs.shape
    assert error(found, truth) < 1.1 * error(torchs, truth) + 1e-4


@needed
def test_attention_far_from_zero() -> None:
    """Scores of some hundreds: only the largest counts, and nothing overflows."""
    query, key, value = 30 * draw(1, 1, 64, 64), 30 * draw(1, 1, 64, 64), draw(1, 1, 64, 64)
    found = native.attention(query, key, value, None, 0.125)
    truth = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert found is not None
    assert error(found, truth) < 0.02


@needed
def test_what_attention_does_not_take() -> None:
    one = draw(1, 2, 8, 64)
    assert native.attention(one, one, one, torch.zeros(8, 8), 1.0) is None
    assert native.attention(one.float(), one.float(), one.float(), None, 1.0) is None
    odd = draw(1, 2, 8, 80)
    assert native.attention(odd, odd, odd, None, 1.0) is None


@needed
def test_elementwise_kernels() -> None:
    states, scale = draw(2, 33, 48), draw(2, 3 * 48)
    shift, factor, _ = scale.chunk(3, 1)

    def modulated(kind: Any) -> torch.Tensor:
        normal: torch.Tensor = F.layer_norm(kind(states), (48,), eps=1e-6)
        out: torch.Tensor = normal * (1 + kind(factor)[:, None]) + kind(shift)[:, None]
        return out

    weight, heads = draw(48), draw(2, 33, 3, 48)
    rows: Any = (
        (native.gelu_tanh(states), lambda k: F.gelu(k(states), approximate="tanh")),
        (native.modulated_norm(states, factor, shift, 1e-6), modulated),
        (native.rms_norm(heads, weight, 1e-6),
         lambda k: F.rms_norm(k(heads), (48,), k(weight), 1e-6)),
        (native.rms_norm(heads.transpose(1, 2), weight, 1e-6),
         lambda k: F.rms_norm(k(heads).transpose(1, 2), (48,), k(weight), 1e-6)),
    )  # fmt: skip
    for found, make in rows:
        truth = make(torch.Tensor.float)
        assert found is not None
        assert error(found, truth) < 1.05 * error(make(torch.Tensor.clone), truth) + 1e-5
    assert native.rms_norm(heads.float(), weight, 1e-6) is None


@needed
def test_rope_is_what_diffusers_computes() -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    states, cosine, sine = draw(2, 19, 3, 32), torch.randn(19, 32), torch.randn(19, 32)
    found = native.rope(states, cosine, sine)
    theirs = apply_rotary_emb(states, (cosine, sine), sequence_dim=1)
    assert found is not None
    assert (found.float() - theirs.float()).abs().max() <= theirs.abs().max() * 2**-7


@pytest.mark.parametrize("compiled", [True, False])
def test_quantised_rows(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel and its twin in plain torch give the same, each row with a scale of its own."""
    if not compiled:
        monkeypatch.setattr(native, "compiled", lambda _: None)
    states = draw(5, 64) * torch.tensor([[1.0], [100.0], [1e-3], [0.0], [3.0]]).bfloat16()
    for signed, kind, middle in ((True, torch.int8, 0), (False, torch.uint8, 128)):
        whole, scales = native.quantised(states, signed=signed)
        assert whole.dtype is kind
        back = (whole.float() - middle) * scales[:, None]
        assert (back - states.float()).abs().max(1).values.le(scales * 0.51).all()
    out, bias, scales = draw(5, 32), draw(32), torch.rand(5)
    expected = (out.float() * scales[:, None] + bias.float()).bfloat16()
    native.scale_rows(out, scales, bias)
    assert (out.float() - expected.float()).abs().max() <= expected.abs().max() * 2**-8


@pytest.mark.parametrize("own", [True, False], ids=["ours", "oneDNN's"])
@pytest.mark.parametrize("outputs,inputs", [(64, 96), (80, 48), (16, 16), (208, 4112)])  # noqa: PT006
@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_in_int8(
    outputs: int, inputs: int, biased: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near as bytes are; where the processor has no such product of ours, by oneDNN twice."""
    here = native.has_int8()
    monkeypatch.setattr(native, "has_int8", lambda: here and own)
    weight, states = draw(outputs, inputs), draw(2, 9, inputs)
    bias = draw(outputs) if biased else None
    product = Int8Linear(weight, bias)  # oneDNN computes it on any CPU, if not fast
    truth = F.linear(states.float(), weight.float(), None if bias is None else bias.float())
    found = product(states)
    assert found.shape == truth.shape
    assert found.dtype is torch.bfloat16
    assert error(found, truth) < 0.02


@pytest.mark.parametrize("own", [True, False], ids=["ours", "oneDNN's"])
def test_a_linear_layer_of_bytes(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored bytes are multiplied as they are: the same bits as their values, which are exact."""
    here = native.has_int8()
    monkeypatch.setattr(native, "has_int8", lambda: here and own)
    whole = torch.randint(-127, 128, (80, 64), generator=RNG, dtype=torch.int8)
    whole[:, 3] = 127
    scales = 2.0 ** torch.arange(-8, 8).repeat(5)
    states, bias = draw(9, 64), draw(80)
    wide = (whole.float() * scales[:, None]).bfloat16()
    found = Int8Linear(whole, bias, scales)(states)
    assert torch.equal(found, Int8Linear(wide, bias)(states))
    assert error(found, F.linear(states.float(), wide.float(), bias.float())) < 0.02
