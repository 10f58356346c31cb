"""Kernels of our own for processors with bfloat16 products in AVX-512 but no AMX.

torch computes attention in bfloat16 there by way of float32, at a quarter of the rate of its
matrix products, and chains of elementwise layers one by one. Each kernel has its twin in plain
torch, which is what it replaces; where it cannot be compiled, or is handed something else than
bfloat16, that is what computes. Decision 0014 says what each gains.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.processor import compiled, cpu_flags

if TYPE_CHECKING:
    import torch

SOURCE = Path(__file__).with_name("kernels.cpp")
CALLS: Counter[str] = Counter()
"""How often each ran in this process."""
_WORTH = 1 << 18
"""Numbers of a tensor; on fewer, torch's own kernels are as fast, and they compute."""
_WIDTHS = (64, 128)
_WANTED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})
_LANES = 16


def available(flags: frozenset[str]) -> bool:
    """Say whether the kernels are for a processor with these features, and can be had here."""
    return flags >= _WANTED and compiled(SOURCE) is not None


def has_attention(flags: frozenset[str]) -> bool:
    """Say whether attention is among them: with AMX torch's own is faster."""
    return available(flags) and "amx_bf16" not in flags


def has_int8() -> bool:
    """Say whether products of bytes are among them: with AMX oneDNN's are faster."""
    flags = cpu_flags()
    return "avx512_vnni" in flags and "amx_int8" not in flags and loaded() is not None


def loaded() -> Any:
    """Return the kernels, or None on a processor without these features."""
    return compiled(SOURCE) if cpu_flags() >= _WANTED else None


def at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Return where a tensor's numbers lie."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _fits(*tensors: torch.Tensor) -> bool:
    import torch

    kinds = all(one.dtype is torch.bfloat16 and one.device.type == "cpu" for one in tensors)
    return kinds and tensors[0].numel() >= _WORTH


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor | None:
    """Return softmax(query key' scale) value, or None where this kernel cannot.

    Args:
        query: (batch, heads, tokens, width), bfloat16; of width 64 or 128.
        key: the same, of any number of tokens.
        value: as key.
        mask: must be None.
        scale: of the products.
    """
    batches, heads, queries, width = query.shape
    same = key.shape == value.shape and key.shape[:2] == query.shape[:2]
    tensors = (query, key, value)
    plain = all(one.stride(-1) == 1 for one in tensors)
    if mask is not None or width not in _WIDTHS or not (same and plain and _fits(*tensors)):
        return None
    CALLS["attention"] += 1
    out = query.new_empty(batches, queries, heads, width).permute(0, 2, 1, 3)
    strides = [stride for one in (*tensors, out) for stride in one.stride()[:3]]
    compiled(SOURCE).danqing_attention(
        *map(at, (*tensors, out)), (ctypes.c_int64 * 12)(*strides),
        batches, heads, queries, key.shape[2], width, ctypes.c_float(scale),
    )  # fmt: skip
    return out


def gelu_tanh(states: torch.Tensor) -> torch.Tensor | None:
    """Return GELU by its approximation with tanh (Hendrycks, Gimpel, 2016), or None."""
    if not (_fits(states) and states.is_contiguous() and states.shape[-1] % _LANES == 0):
        return None
    CALLS["gelu"] += 1
    out = states.new_empty(states.shape)
    width = states.shape[-1]
    rows = ctypes.c_int64(states.numel() // width)
    compiled(SOURCE).danqing_gelu_tanh(at(states), at(out), rows, ctypes.c_int64(width))
    return out


def modulated_norm(
    states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor | None:
    """Return layer_norm(states) (1 + scale) + shift, or None where this kernel cannot.

    Args:
        states: (pictures, tokens, width).
        scale: (pictures, width); of rows that may lie apart.
        shift: the same, with rows as far apart.
        eps: of the norm.
    """
    pictures, tokens, width = states.shape
    apart = scale.stride(0)
    fits = _fits(states, scale, shift) and states.is_contiguous() and width % _LANES == 0
    fits = fits and scale.stride(1) == shift.stride(1) == 1 and shift.stride(0) == apart
    if not fits or scale.shape != (pictures, width):
        return None
    CALLS["modulated_norm"] += 1
    out = states.new_empty(states.shape)
    compiled(SOURCE).danqing_modulated_norm(
        *map(at, (states, scale, shift, out)),
        *map(ctypes.c_int64, (pictures, tokens, width, apart)),
        ctypes.c_float(eps),
    )
    return out


def rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """Divide by the root mean square, times a weight; or return None where this kernel cannot."""
    if not states.is_contiguous() and states.ndim == 4:  # noqa: PLR2004
        turned = states.transpose(1, 2)
        if turned.is_contiguous():  # heads before tokens, but not in memory
            found = rms_norm(turned, weight, eps)
            return None if found is None else found.transpose(1, 2)
    width = states.shape[-1]
    fits = _fits(states, weight) and states.is_contiguous() and width % _LANES == 0
    if not fits or weight.shape != (width,):
        return None
    CALLS["rms_norm"] += 1
    out = states.new_empty(states.shape)
    rows = ctypes.c_int64(states.numel() // width)
    compiled(SOURCE).danqing_rms_norm(
        *map(at, (states, weight, out)), rows, ctypes.c_int64(width), ctypes.c_float(eps)
    )
    return out


def rope(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor | None:
    """Turn pairs of neighbouring numbers, or return None where this kernel cannot.

    Args:
        states: (batch, tokens, heads, width).
        cosine: (tokens, width), float32, each number twice.
        sine: the same.
    """
    fits = _fits(states) and states.is_contiguous() and states.shape[-1] % _LANES == 0
    if not fits or not (cosine.is_contiguous() and sine.is_contiguous()):
        return None
    CALLS["rope"] += 1
    out = states.new_empty(states.shape)
    compiled(SOURCE).danqing_rope(
        *map(at, (states, cosine, sine, out)), *map(ctypes.c_int64, states.shape)
    )
    return out


def quantised(states: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows in int8 and the scale of each, the largest of a row being 127.

    Args:
        states: (rows, width), bfloat16.
        signed: as int8, or as uint8 around 128.
    """
    import torch

    rows, width = states.shape
    kind = torch.int8 if signed else torch.uint8
    own = loaded()
    if own is None or width % _LANES or not states.is_contiguous():
        values = states.float()
        scales = values.abs().amax(1).clamp(min=1e-30) / 127
        whole = (values / scales[:, None]).round() + (0 if signed else 128)
        return whole.to(kind), scales
    found = torch.empty(rows, width, dtype=kind)
    scales = torch.empty(rows)
    run = own.danqing_quantise_weights if signed else own.danqing_quantise_activations
    run(at(states), at(found), at(scales), ctypes.c_int64(rows), ctypes.c_int64(width))
    return found, scales


def scale_rows(states: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Multiply rows by a scale each and add a bias, in place.

    Args:
        states: (rows, width), bfloat16.
        scales: (rows,), float32.
        bias: (width,), bfloat16, or None.
    """
    rows, width = states.shape
    own = loaded()
    if own is None or width % _LANES:
        found = states.float() * scales[:, None]
        states.copy_(found if bias is None else found + bias.float())
        return
    own.danqing_scale_rows(
        *map(at, (states, scales, bias)), ctypes.c_int64(rows), ctypes.c_int64(width)
    )


def kernels() -> dict[str, Any]:
    """Return the fused kernels by the names of `danqing.networks.kernels.fuse`."""
    return {
        "rms_norm": rms_norm, "rope": rope, "gelu": gelu_tanh, "modulated_norm": modulated_norm,
    }  # fmt: skip
