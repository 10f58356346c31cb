"""torch_npu's fused kernels, each a switch, each counted; and one kernel put right.

They follow torch_npu 2.13's documentation of its operators. None was run on a card by danqing: use
`danqing verify invariance` there before trusting one.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

CALLS: Counter[str] = Counter()
"""How often each ran in this process."""


def _torch_npu() -> Any:
    return importlib.import_module("torch_npu")


def rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide by the root mean square: one kernel, where torch's own becomes six."""
    CALLS["rms_norm"] += 1
    normal: torch.Tensor = _torch_npu().npu_rms_norm(states, weight.to(states.dtype), eps)[0]
    return normal


def rope(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbouring numbers, in float32 as torch's own does.

    Args:
        states: (batch, tokens, heads, width).
        cosine: (tokens, width), float32, each number twice.
        sine: the same.
    """
    CALLS["rope"] += 1
    turned: torch.Tensor = _torch_npu().npu_rotary_mul(
        states.float(), cosine[None, :, None], sine[None, :, None], rotary_mode="interleave"
    )
    return turned.to(states.dtype)


def group_norm_silu(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> torch.Tensor:
    """Normalise groups of channels and apply SiLU."""
    CALLS["group_norm_silu"] += 1
    result: torch.Tensor = _torch_npu().npu_group_norm_silu(states, weight, bias, groups, eps)[0]
    return result


def fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor | None:
    """Attend with npu_fusion_attention; None where it cannot, and torch's own must.

    Args:
        query: (batch, heads, tokens, width).
        key: the same, its own number of tokens.
        value: like the key.
        mask: boolean, True where attention is paid, broadcast to (batch, heads, tokens, tokens).
            The kernel takes its inverse, and all of it. An additive mask is left to torch: as a
            boolean one it would be lost.
        scale: of the products.
    """
    if mask is not None and str(mask.dtype) != "torch.bool":
        return None
    CALLS["fusion_attention"] += 1
    out = None
    if mask is not None:
        whole = mask[(None,) * (4 - mask.dim())]
        sides = (query.shape[0], whole.shape[1], query.shape[2], key.shape[2])
        out = (~whole).expand(sides).contiguous()
    mixed: torch.Tensor = _torch_npu().npu_fusion_attention(
        query.contiguous(), key.contiguous(), value.contiguous(), query.shape[1], "BNSD",
        atten_mask=out, scale=scale,
    )[0]  # fmt: skip
    return mixed


def mindie_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor | None:
    """Attend with MindIE-SD's laser attention; None where there is a mask.

    Its documentation: layout BNSD, float16 or bfloat16; https://gitcode.com/Ascend/MindIE-SD.
    """
    if mask is not None or str(query.dtype) == "torch.float32":
        return None
    CALLS["mindie_attention"] += 1
    mixed: torch.Tensor = importlib.import_module("mindiesd").attention_forward(
        query, key, value, scale=scale, op_type="ascend_laser_attention", input_layout="BNSD"
    )
    return mixed


FUSED: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "rope": rope,
    "group_norm_silu": group_norm_silu,
}

_LIBRARIES: list[Any] = []  # an operator ends with its library


def honour_gelu() -> bool:
    """Give `F.gelu` on an NPU the formula it was asked for; return whether that was possible.

    torch_npu 2.13 calls one kernel (aclnnGelu) for both, whatever `approximate` says; the two
    differ by up to 5e-4. Its own `npu_gelu` (aclnnGeluV2) takes the name of the formula.
    """
    npu = _torch_npu()
    if _LIBRARIES or not hasattr(npu, "npu_gelu"):
        return bool(_LIBRARIES)
    import torch

    def gelu(states: Any, *, approximate: str = "none") -> Any:
        CALLS["gelu"] += 1
        return npu.npu_gelu(states, approximate=approximate)

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore", UserWarning)  # torch says that a kernel is replaced
        library.impl("gelu", gelu, "PrivateUse1")  # type: ignore[no-untyped-call]
        _LIBRARIES.append(library)
    return bool(_LIBRARIES)
