"""Which kernels compute: of attention the one asked for, of other layers a device's fused ones."""

from __future__ import annotations

import contextlib
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from danqing.devices import OWN_ATTENTION
from danqing.networks import of_diffusers

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
    layers: list[Any] = list(module.modules())
    for layer in layers:
        if "rms_norm" in kernels and type(layer) is torch.nn.RMSNorm and layer.weight is not None:
            vars(layer)["forward"] = partial(
                _fused_rms_norm, layer, kernels["rms_norm"], layer.forward
            )
        if "gelu" in kernels:
            of_diffusers.fuse_gelu(layer, kernels["gelu"])
        if "modulated_norm" in kernels:
            of_diffusers.fuse_modulated_norm(layer, kernels["modulated_norm"])
        if "group_norm_silu" in kernels:
            of_diffusers.fuse_group_norms(layer, kernels["group_norm_silu"])
    if "rope" in kernels:
        of_diffusers.fuse_rope(module, kernels["rope"])


EXCHANGED = ("forward", "gelu")
"""Methods of a layer that `fuse` and `of_diffusers.choose_by_tensor` exchange."""


def let_go(module: torch.nn.Module) -> None:
    """Take out of a module that is dropped what was put in place of its layers' methods.

    Such a layer refers to itself: its weights would stay until Python looks for cycles, in memory
    that the next stage counts on; and looking for them takes a third of a second.
    """
    for layer in module.modules():
        for name in EXCHANGED:
            vars(layer).pop(name, None)


def _fused_rms_norm(
    layer: Any, kernel: Callable[..., Any], plain: Callable[..., Any], states: torch.Tensor
) -> Any:
    eps = torch.finfo(states.dtype).eps if layer.eps is None else layer.eps
    found = kernel(states, layer.weight, eps)
    return plain(states) if found is None else found
