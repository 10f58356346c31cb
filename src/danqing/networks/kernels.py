"""Which kernels compute: of attention the one asked for, of other layers that of the tensor.

Some layers of diffusers choose a kernel by what is installed; here they look where the tensor is.
`RMSNorm` and `GEGLU` call an accelerator's kernel wherever its library can be imported, and then
fail on a CPU beside it: no CPU reference could be computed there
(https://github.com/huggingface/diffusers/issues/14380; diffusers 0.38 and 0.42).
"""

from __future__ import annotations

import contextlib
import warnings
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from danqing.devices import BACKENDS, OWN_ATTENTION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from danqing.devices import Device


@contextlib.contextmanager
def attention(name: str, device: Device | None = None) -> Iterator[None]:
    """Compute attention with this kernel, as long as the context lasts.

    Args:
        name: `auto` or `torch` for the one torch prefers, one of torch's, or of the device's own.
        device: whose own kernels may be meant; they compute what is on it.
    """
    if name in ("auto", "torch"):
        yield
        return
    if device is not None and name in device.attentions:
        with _Attention(device.attentions[name], device.family):
            yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    with sdpa_kernel(backends[name]):
        yield


class _Attention(TorchFunctionMode):
    """Takes torch's calls of attention to a kernel, where that says it can."""

    def __init__(self, kernel: Callable[..., Any], family: str) -> None:
        super().__init__()
        self._kernel = kernel
        self._family = family

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            found = self._try(*args, **kwargs)
            if found is not None:
                return found
        return function(*args, **kwargs)

    def _try(  # noqa: PLR0917 - torch's own order
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> Any:
        if query.device.type != self._family or is_causal or dropout_p or enable_gqa:
            return None
        return self._kernel(query, key, value, attn_mask, scale or query.shape[-1] ** -0.5)


def has_attention(name: str, device: Device, dtype: str) -> bool:
    """Try a kernel on a device with one small head."""
    if name in ("auto", "torch") or name in device.attentions:
        return True
    if name in OWN_ATTENTION:
        return False
    kind = getattr(torch, dtype)
    one = torch.zeros(1, 1, 8, 64, dtype=kind, device=device.torch_device)
    try:
        with attention(name), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says why each kernel is not usable
            F.scaled_dot_product_attention(one, one, one)
    except RuntimeError:
        return False
    return True


def fuse(module: torch.nn.Module, kernels: Mapping[str, Callable[..., Any]]) -> None:
    """Let the layers inside a module use a device's fused kernels.

    Args:
        module: on that device.
        kernels: `rms_norm(states, weight, eps)`; `rope(states, cosine, sine)` of states (batch,
            tokens, heads, width); `group_norm_silu(states, weight, bias, groups, eps)`;
            `gelu(states)`, by tanh; `modulated_norm(states, scale, shift, eps)`. All may return
            None where they cannot, and the layer itself computes.
    """
    for layer in list(module.modules()):
        if "rms_norm" in kernels and type(layer) is torch.nn.RMSNorm and layer.weight is not None:
            _replace(layer, partial(_fused_rms_norm, layer, kernels["rms_norm"], layer.forward))
        if "gelu" in kernels:
            _fuse_gelu(layer, kernels["gelu"])
        if "modulated_norm" in kernels:
            _fuse_modulated_norm(layer, kernels["modulated_norm"])
        if "group_norm_silu" in kernels:
            _fuse_group_norms(layer, kernels["group_norm_silu"])
    if "rope" in kernels:
        _fuse_rope(module, kernels["rope"])


def let_go(module: torch.nn.Module) -> None:
    """Take out of a module that is dropped what was put in place of its layers' methods.

    Such a layer refers to itself: its weights would stay until Python looks for cycles, in memory
    that the next stage counts on; and looking for them takes a third of a second.
    """
    for layer in module.modules():
        for name in _EXCHANGED:
            vars(layer).pop(name, None)


def _fused_rms_norm(
    layer: Any, kernel: Callable[..., Any], plain: Callable[..., Any], states: torch.Tensor
) -> Any:
    eps = torch.finfo(states.dtype).eps if layer.eps is None else layer.eps
    found = kernel(states, layer.weight, eps)
    return plain(states) if found is None else found


def _fuse_gelu(layer: Any, kernel: Callable[..., Any]) -> None:
    """Let a GELU by tanh be computed by a kernel: torch's layer, and diffusers' own."""
    from diffusers.models.activations import GELU

    if type(layer) is torch.nn.GELU and layer.approximate == "tanh":
        _replace(layer, partial(_or_else, kernel, layer.forward))
    elif type(layer) is GELU and layer.approximate == "tanh":
        _replace(layer, partial(_or_else, kernel, layer.gelu), method="gelu")


def _or_else(kernel: Callable[..., Any], plain: Callable[..., Any], *given: Any) -> torch.Tensor:
    found: torch.Tensor | None = kernel(*given)
    return plain(*given) if found is None else found


def _fuse_modulated_norm(layer: Any, kernel: Callable[..., Any]) -> None:
    """Let diffusers' adaLN norms do norm, scale and shift at once."""
    from diffusers.models import normalization

    kinds = {
        normalization.AdaLayerNormZero: 6,
        normalization.AdaLayerNormZeroSingle: 3,
        normalization.AdaLayerNormContinuous: 2,
    }
    parts = kinds.get(type(layer))
    norm = getattr(layer, "norm", None)
    plain = type(norm) is torch.nn.LayerNorm and not norm.elementwise_affine
    if parts is not None and plain and getattr(layer, "emb", None) is None:
        _replace(layer, partial(_modulated, layer, layer.forward, kernel, parts))


def _modulated(
    layer: Any,
    plain: Callable[..., Any],
    kernel: Callable[..., Any],
    parts: int,
    states: torch.Tensor,
    *given: Any,
    **named: Any,
) -> Any:
    """As the layer's own forward; it has (scale, shift) last, or (shift, scale, gate, ...)."""
    embedded = named.get("emb", given[-1] if given else None)
    if embedded is None or embedded.dtype is not states.dtype:
        return plain(states, *given, **named)
    seen = layer.linear(layer.silu(embedded))
    chunks = seen.chunk(parts, dim=1)
    scale, shift = chunks if parts == 2 else (chunks[1], chunks[0])  # noqa: PLR2004
    found = kernel(states, scale, shift, layer.norm.eps)
    if found is None:
        found = layer.norm(states) * (1 + scale[:, None]) + shift[:, None]
    return found if parts == 2 else (found, *chunks[2:])  # noqa: PLR2004


def _fuse_group_norms(layer: Any, kernel: Callable[..., Any]) -> None:
    """Let the norms that a SiLU follows do it; the SiLU then does nothing."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D

    if isinstance(layer, ResnetBlock2D) and isinstance(layer.nonlinearity, torch.nn.SiLU):
        norms, silu = [layer.norm1, layer.norm2], "nonlinearity"
    elif isinstance(layer, (Decoder, Encoder)) and isinstance(layer.conv_act, torch.nn.SiLU):
        norms, silu = [layer.conv_norm_out], "conv_act"
    else:
        return
    if not all(type(norm) is torch.nn.GroupNorm for norm in norms):
        return
    for norm in norms:
        _replace(norm, partial(_fused_group_norm, norm, kernel))
    setattr(layer, silu, torch.nn.Identity())


def _fused_group_norm(norm: Any, kernel: Callable[..., Any], states: torch.Tensor) -> Any:
    return kernel(states, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _fuse_rope(module: torch.nn.Module, kernel: Callable[..., Any]) -> None:
    """Let the attention of a FLUX.1 transformer rotate queries and keys with a kernel."""
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    for layer in module.modules():
        if type(getattr(layer, "processor", None)) is FluxAttnProcessor:
            layer.processor = _with_rope(layer.processor, kernel)


def _with_rope(processor: Any, kernel: Callable[..., Any]) -> Any:
    """Return a processor whose `apply_rotary_emb` is the kernel, where the kernel can.

    diffusers' processor finds that function among its module's globals (0.38 and 0.42). Replaced
    there, it would be replaced for every diffusers pipeline of the process. The copy of the method
    has globals of its own.
    """
    plain = type(processor).__call__
    rotate = plain.__globals__["apply_rotary_emb"]

    def rotated(states: torch.Tensor, tables: Any, **options: Any) -> Any:
        turned = kernel(states, *tables)
        return rotate(states, tables, **options) if turned is None else turned

    names = {**plain.__globals__, "apply_rotary_emb": rotated}
    call = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)
    own = type("FusedFluxAttnProcessor", (type(processor),), {"__call__": call})()
    vars(own).update(vars(processor))
    return own


_EXCHANGED = ("forward", "gelu")
"""Methods that `_replace` may exchange."""


def _replace(layer: Any, by: Callable[..., Any], *, method: str = "forward") -> None:
    setattr(layer, method, by)


def choose_by_tensor(module: torch.nn.Module) -> None:
    """Give each such layer inside a module a forward that looks at its input's device."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.normalization import RMSNorm

    plain: dict[type, Callable[..., torch.Tensor]] = {RMSNorm: _rms_norm, GEGLU: _geglu}
    for layer in module.modules():
        if type(layer) in plain:
            _replace(layer, partial(_by_tensor, layer, layer.forward, plain[type(layer)]))


def _by_tensor(
    layer: Any,
    fused: Callable[[torch.Tensor], torch.Tensor],
    plain: Callable[[Any, torch.Tensor], torch.Tensor],
    states: torch.Tensor,
) -> torch.Tensor:
    return fused(states) if states.device.type in BACKENDS else plain(layer, states)


def _rms_norm(layer: Any, states: torch.Tensor) -> torch.Tensor:
    """Divide by the root of the mean square, taken in float32 (Zhang, Sennrich, 2019)."""
    mean_square = states.float().pow(2).mean(-1, keepdim=True)
    normal = states * torch.rsqrt(mean_square + layer.eps)
    if layer.weight is None:
        return normal.to(states.dtype)
    if layer.weight.dtype in (torch.float16, torch.bfloat16):
        normal = normal.to(layer.weight.dtype)
    weighted: torch.Tensor = normal * layer.weight
    return weighted if layer.bias is None else weighted + layer.bias


def _geglu(layer: Any, states: torch.Tensor) -> torch.Tensor:
    """Gate one half by GELU of the other (Shazeer: GLU Variants Improve Transformer, 2020)."""
    value, gate = layer.proj(states).chunk(2, dim=-1)
    gated: torch.Tensor = value * F.gelu(gate)
    return gated
