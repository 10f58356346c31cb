"""A `torch_npu` for the simulated device: the fused operators, computed on the CPU.

Their rules are those of torch_npu 2.13's schemas: which layouts, dtypes and masks are taken. A CPU
tensor is refused, as there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import types
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

CALLS: Counter[str] = Counter()
"""How often each was called."""
_LIBRARIES: list[
    torch.library.Library
] = []  # they end what they registered when they are collected
_ALL = 2147483647


def make_torch_npu(native: Any, npu: types.ModuleType) -> None:
    """Put a module `torch_npu` into `sys.modules`, and answer who asks for its version."""
    module = types.ModuleType("torch_npu", "The simulated NPU: no hardware.")
    module.__version__ = torch.__version__.split("+")[0]
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None, is_package=True)
    module.npu = npu
    vars(module).update(_operators(native))
    module.get_npu_format = lambda _: 2  # ND: no private format
    sys.modules["torch_npu"] = module
    sys.modules["torch_npu.npu"] = npu
    sys.meta_path.append(_Finder(module))


class _Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata.version('torch_npu')` finds."""

    def __init__(self, version: str) -> None:
        self._version = version

    def read_text(self, filename: str) -> str | None:
        if filename in {"METADATA", "PKG-INFO"}:
            return f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {self._version}\n"
        return "torch_npu\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return path


class _Finder(importlib.metadata.DistributionFinder):
    def __init__(self, module: Any) -> None:
        self._module = module

    def find_spec(self, name: str, *_: object) -> Any:
        return self._module.__spec__ if name == "torch_npu" else None

    def find_distributions(
        self,
        context: Any = importlib.metadata.DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[importlib.metadata.Distribution]:
        asked = context.name
        if asked is None or asked.replace("-", "_").lower() == "torch_npu":
            return [_Distribution(self._module.__version__)]
        return []


# --- operators -----------------------------------------------------------------------------------


def _operators(native: Any) -> dict[str, Callable[..., Any]]:
    library = torch.library.Library("npu", "DEF")
    _LIBRARIES.append(library)

    def register(schema: str, compute: Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
        name = schema.split("(", maxsplit=1)[0]
        library.define(schema)
        library.impl(name, _on_device(native, name, compute), "PrivateUse1")

        def public(*args: Any, **kwargs: Any) -> Any:
            CALLS[name] += 1
            return getattr(torch.ops.npu, name)(*args, **kwargs)

        return name, public

    return dict(register(schema, compute) for schema, compute in _TABLE)


def _on_device(native: Any, name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """Compute on the bytes of the device's tensors, and give the results back as the device's."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        for one in given:
            if one.device.type != "npu":
                msg = (
                    "Expected all tensors to be on the same device. Expected NPU tensor, please "
                    f"check whether the input tensor device is correct. (npu::{name}) ERR01002"
                )
                raise RuntimeError(msg)
        device = given[0].device.index

        def there(one: Any) -> Any:
            return native.on_cpu(one) if isinstance(one, torch.Tensor) else one

        found = compute(*map(there, args), **{key: there(one) for key, one in kwargs.items()})
        if isinstance(found, tuple):
            return tuple(
                native.adopt(one, device) if isinstance(one, torch.Tensor) else one for one in found
            )
        return native.adopt(found, device)

    return kernel


def _refuse(name: str, why: str) -> None:
    msg = f"call aclnn{name} failed, error code is 161002\nERR00100 PTA call acl api failed."
    raise RuntimeError(f"{msg}\nEZ1001: {why}")


_HEADS_FIRST: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "BNSD": lambda one, _: one,
    "BSND": lambda one, _: one.transpose(1, 2),
    "BSH": lambda one, heads: one.unflatten(-1, (heads, -1)).transpose(1, 2),
    "SBH": lambda one, heads: one.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3),
}
_BACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "BNSD": lambda one: one,
    "BSND": lambda one: one.transpose(1, 2),
    "BSH": lambda one: one.transpose(1, 2).flatten(2),
    "SBH": lambda one: one.permute(2, 0, 1, 3).flatten(2),
}
_LEFT_UP, _RIGHT_DOWN = 2, 3
_MOST_WIDTH = 768


_FURTHER: dict[str, Any] = {
    "pse": None, "padding_mask": None, "atten_mask": None, "scale": 1.0, "keep_prob": 1.0,
    "pre_tockens": _ALL, "next_tockens": _ALL, "inner_precise": 0, "prefix": None,
    "actual_seq_qlen": None, "actual_seq_kvlen": None, "sparse_mode": 0,
    "gen_mask_parallel": True, "sync": False, "softmax_layout": "", "sink": None,
    "dropout_mask": None, "seed": 0, "offset": 0,
}  # fmt: skip
"""Further arguments of npu_fusion_attention, in the schema's order, with its defaults."""


def _fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *further: Any,
    **named: Any,
) -> tuple[Any, ...]:
    """Attend; of the mask, True is left out: the inverse of torch's."""
    if query.dtype not in {torch.float16, torch.bfloat16, torch.float32}:
        _refuse("FlashAttentionScore", f"query not implemented for {query.dtype}")
    if input_layout not in _HEADS_FIRST:
        _refuse("FlashAttentionScore", f"layout {input_layout}")
    split = _HEADS_FIRST[input_layout]
    width = query.shape[-1] if "N" in input_layout else query.shape[-1] // head_num
    if width > _MOST_WIDTH:
        _refuse("FlashAttentionScore", f"D is {width}, at most {_MOST_WIDTH}")
    heads = key.shape[-1] // width if "N" not in input_layout else head_num
    queries, keys, values = split(query, head_num), split(key, heads), split(value, heads)
    typed = dict(zip([*_FURTHER][: len(further)], further, strict=True))
    settings = {**_FURTHER, **typed, **named}
    around = (settings["pre_tockens"], settings["next_tockens"])
    mask = _allowed(
        settings["atten_mask"], queries.shape[2], keys.shape[2], settings["sparse_mode"], around
    )
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=settings["scale"],
        enable_gqa=keys.shape[1] != head_num,
    )  # fmt: skip
    sums = torch.zeros(*queries.shape[:3], 8)
    nothing = torch.empty(0, dtype=query.dtype)
    return _BACK[input_layout](mixed).contiguous(), sums, sums.clone(), nothing, 0, 0, 0


def _allowed(
    mask: torch.Tensor | None, rows: int, columns: int, mode: int, around: tuple[int, int]
) -> torch.Tensor | None:
    """Return what may be attended to, as torch's boolean mask; None for everything."""
    down, across = torch.arange(rows)[:, None], torch.arange(columns)[None]
    if mode == _LEFT_UP:
        return across <= down
    if mode == _RIGHT_DOWN:
        return across <= down + (columns - rows)
    if mask is None:
        return None
    if mask.dtype not in {torch.bool, torch.uint8}:
        _refuse("FlashAttentionScore", "attenMask must be BOOL or UINT8")
    if tuple(mask.shape[-2:]) != (rows, columns):
        _refuse(
            "FlashAttentionScore",
            f"attenMask is {list(mask.shape)}, not [..., {rows}, {columns}] (BNSS, B1SS, 11SS, SS)",
        )
    before, after = around
    return ~mask.bool() & (across >= down - before) & (across <= down + after)


def _rms_norm(states: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Any:
    if gamma.dtype is not states.dtype:
        _refuse("RmsNorm", f"gamma is {gamma.dtype}, x is {states.dtype}")
    inverse = torch.rsqrt(states.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return ((states.float() * inverse).to(states.dtype) * gamma), inverse


def _add_rms_norm(
    one: torch.Tensor, two: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> Any:
    added = one + two
    return (*_rms_norm(added, gamma, epsilon), added)


def _rotary_mul(
    states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, rotary_mode: str = "half",
    rotate: Any = None,  # noqa: ARG001
) -> torch.Tensor:  # fmt: skip
    if rotary_mode == "half":
        one, two = states.chunk(2, -1)
        turned = torch.cat((-two, one), -1)
    else:
        turned = torch.stack((-states[..., 1::2], states[..., ::2]), -1).flatten(-2)
    return (states * cosine + turned * sine).to(states.dtype)


def _geglu(
    states: torch.Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False  # noqa: FBT001, FBT002
) -> Any:  # fmt: skip
    value, gate = states.chunk(2, dim)
    if activate_left:
        value, gate = gate, value
    gelu = F.gelu(gate, approximate="tanh" if approximate == 1 else "none")
    return value * gelu, gelu


def _swiglu(states: torch.Tensor, dim: int = -1) -> torch.Tensor:
    gate, value = states.chunk(2, dim)
    return F.silu(gate) * value


def _group_norm_silu(
    states: torch.Tensor, weight: Any, bias: Any, group: int, eps: float = 1e-5
) -> Any:
    statistics = torch.zeros(states.shape[0], group)
    normal = F.group_norm(states, group, weight, bias, eps)
    return F.silu(normal), statistics, statistics.clone()


_TABLE: tuple[tuple[str, Callable[..., Any]], ...] = (
    (
        ("npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, "
        "str input_layout, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, "
        "float scale=1., float keep_prob=1., int pre_tockens=2147483647, "
        "int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
        "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, "
        "bool gen_mask_parallel=True, bool sync=False, str softmax_layout='', Tensor? sink=None, "
        "Tensor? dropout_mask=None, int seed=0, int offset=0) "
        "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)"),
        _fusion_attention,
    ),
    ("npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)", _rms_norm),
    (
        ("npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) "
        "-> (Tensor, Tensor, Tensor)"),
        _add_rms_norm,
    ),
    (
        ("npu_rotary_mul(Tensor self, Tensor r1, Tensor r2, str rotary_mode='half', "
        "Tensor? rotate=None) -> Tensor"),
        _rotary_mul,
    ),
    ("npu_swiglu(Tensor self, int dim=-1) -> Tensor", _swiglu),
    (
        ("npu_geglu(Tensor self, int dim=-1, int approximate=1, bool activate_left=False) "
        "-> (Tensor, Tensor)"),
        _geglu,
    ),
    (
        "npu_fast_gelu(Tensor self) -> Tensor",
        lambda states: states * torch.sigmoid(1.702 * states),
    ),
    (
        ("npu_group_norm_silu(Tensor input, Tensor? weight, Tensor? bias, int group, "
        "float eps=0.00001) -> (Tensor, Tensor, Tensor)"),
        _group_norm_silu,
    ),
    (
        "npu_format_cast(Tensor self, int acl_format) -> Tensor",
        lambda states, acl_format: states.clone(),  # noqa: ARG005
    ),
)  # fmt: skip
"""Schemas of torch_npu 2.13, and what each computes."""
