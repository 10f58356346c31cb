"""Every place that depends on how diffusers is made inside, not on its public interface.

Each function names the versions it was seen in: 0.38.0 and 0.42.1, the oldest and the newest that
danqing runs on. `tests/networks/test_insides.py` says which of them no longer fits. Nothing is
changed for the whole process: a program's own diffusers pipelines stay as they are.
"""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

from danqing.devices import BACKENDS
from danqing.networks.messages import without_message

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def or_else(kernel: Callable[..., Any], plain: Callable[..., Any], *given: Any) -> torch.Tensor:
    """Compute with a kernel, or as the layer itself does where the kernel returns None."""
    found: torch.Tensor | None = kernel(*given)
    return plain(*given) if found is None else found


def fuse_gelu(layer: Any, kernel: Callable[..., Any]) -> None:
    """Let a GELU by tanh be computed by a kernel: torch's layer, and diffusers' own.

    Relies on `GELU.gelu(gate)`, which `GELU.forward` calls (diffusers 0.38.0 and 0.42.1).
    """
    from diffusers.models.activations import GELU

    if type(layer) is torch.nn.GELU and layer.approximate == "tanh":
        vars(layer)["forward"] = partial(or_else, kernel, layer.forward)
    elif type(layer) is GELU and layer.approximate == "tanh":
        layer.gelu = partial(or_else, kernel, layer.gelu)


def fuse_modulated_norm(layer: Any, kernel: Callable[..., Any]) -> None:
    """Let diffusers' adaLN norms do norm, scale and shift at once.

    `_modulated` repeats the forward of three classes: of `silu`, `linear` and `norm`, the order of
    the chunks, and an `emb` that is the last argument (diffusers 0.38.0 and 0.42.1).
    """
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
        layer.forward = partial(_modulated, layer, layer.forward, kernel, parts)


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


def fuse_group_norms(layer: Any, kernel: Callable[..., Any]) -> None:
    """Let the norms that a SiLU follows do it; the SiLU then does nothing.

    Relies on `ResnetBlock2D.nonlinearity` following `norm1` and `norm2`, and on `conv_act`
    following `conv_norm_out` in the autoencoder, and nothing else (diffusers 0.38.0 and 0.42.1).
    """
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
        norm.forward = partial(_fused_group_norm, norm, kernel)
    setattr(layer, silu, torch.nn.Identity())


def _fused_group_norm(norm: Any, kernel: Callable[..., Any], states: torch.Tensor) -> Any:
    return kernel(states, norm.weight, norm.bias, norm.num_groups, norm.eps)


def fuse_rope(module: torch.nn.Module, kernel: Callable[..., Any]) -> None:
    """Let the attention of a FLUX.1 transformer rotate queries and keys with a kernel.

    Relies on `FluxAttnProcessor.__call__` finding `apply_rotary_emb(states, tables)` among the
    globals of its module (diffusers 0.38.0 and 0.42.1).
    """
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    for layer in module.modules():
        if type(getattr(layer, "processor", None)) is FluxAttnProcessor:
            layer.processor = _with_rope(layer.processor, kernel)


def _with_rope(processor: Any, kernel: Callable[..., Any]) -> Any:
    """Return a processor whose `apply_rotary_emb` is the kernel, where the kernel can.

    Replaced in the module, it would be replaced for every diffusers pipeline of the process. The
    copy of the method has globals of its own.
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


def choose_by_tensor(module: torch.nn.Module) -> None:
    """Let `RMSNorm` and `GEGLU` look where their input is, not what is installed.

    They call an accelerator's kernel wherever its library can be imported, and then fail on a CPU
    beside it: no CPU reference could be computed there
    (https://github.com/huggingface/diffusers/issues/14380; diffusers 0.38.0 and 0.42.1). The
    forwards here are theirs without that (`_rms_norm`, `_geglu`).
    """
    from diffusers.models.activations import GEGLU
    from diffusers.models.normalization import RMSNorm

    plain: dict[type, Callable[..., torch.Tensor]] = {RMSNorm: _rms_norm, GEGLU: _geglu}
    for layer in module.modules():
        if type(layer) in plain:
            layer.forward = partial(_by_tensor, layer, layer.forward, plain[type(layer)])


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


def modulations(transformer: torch.nn.Module) -> list[str]:
    """Return the paths of the linear layers inside diffusers' adaLN norms, in order.

    Relies on each norm calling its `linear` on a SiLU of the embedding and on nothing else
    (diffusers 0.38.0 and 0.42.1).
    """
    from diffusers.models import normalization

    kinds = (
        normalization.AdaLayerNormZero,
        normalization.AdaLayerNormZeroSingle,
        normalization.AdaLayerNormContinuous,
        normalization.SD35AdaLayerNormZeroX,
    )
    return [
        f"{name}.linear" for name, layer in transformer.named_modules() if isinstance(layer, kinds)
    ]


def set_attention_backend(transformer: Any, backend: str) -> None:
    """Choose the attention of a transformer without the log line that this is experimental.

    The line is logged by `diffusers.models.modeling_utils` (diffusers 0.38.0 and 0.42.1).
    """
    with without_message(
        "diffusers.models.modeling_utils", "Attention backends are an experimental"
    ):
        transformer.set_attention_backend(backend)


def run_sd3(
    transformer: Any,
    images: Sequence[torch.Tensor],
    context: torch.Tensor,
    pooled: torch.Tensor,
    timestep: torch.Tensor,
) -> torch.Tensor:
    """Run an SD3 transformer on several images of each row; return the velocity of the first.

    Repeats `SD3Transformer2DModel.forward`, which takes one image: the patches of each follow the
    others', with the positions of an image of its own (diffusers 0.38.0 and 0.42.1).

    Args:
        transformer: diffusers' SD3Transformer2DModel.
        images: (rows, channels, height, width) each; the sizes may differ.
        context: (rows, tokens, joint width).
        pooled: (rows, pooled width).
        timestep: (rows,), 0 to 1000, float32.

    Returns:
        (rows, channels, height, width).
    """
    patch = transformer.config.patch_size
    height, width = (side // patch for side in images[0].shape[-2:])
    states = torch.cat([transformer.pos_embed(image) for image in images], dim=1).contiguous()
    condition = transformer.time_text_embed(timestep, pooled)
    words = transformer.context_embedder(context)
    for block in transformer.transformer_blocks:
        words, states = block(hidden_states=states, encoder_hidden_states=words, temb=condition)
    states = transformer.norm_out(states[:, : height * width], condition)
    patches: torch.Tensor = transformer.proj_out(states)
    grid = patches.reshape(len(patches), height, width, patch, patch, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
