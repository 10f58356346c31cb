"""Configs of FLUX.1's networks, read off the shapes of the BFL release: it has no config files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing.errors import CheckpointIncompleteError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from danqing.weights import Component

VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159
"""Of the FLUX.1 autoencoder: latents = scale * (z - shift). BFL, flux/util.py."""
GROUPS = 32


def schedule_config(*, guided: bool) -> dict[str, Any]:
    """Return the noise schedule: shifted by resolution except in schnell. BFL, flux/sampling.py."""
    shifted = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
    shifted |= {"max_image_seq_len": 4096, "shift": 3.0, "use_dynamic_shifting": True}
    plain = {"shift": 1.0, "use_dynamic_shifting": False}
    return {"num_train_timesteps": 1000, **(shifted if guided else plain)}


def transformer_config(component: Component) -> dict[str, Any]:
    """Return the config diffusers' FluxTransformer2DModel needs for these weights."""
    hidden, inputs = _shape(component, "img_in.weight")
    head = _shape(component, "double_blocks.0.img_attn.norm.query_norm.scale")[0]
    return {
        "patch_size": 1,
        "in_channels": inputs,
        "num_layers": count(component.entries, "double_blocks."),
        "num_single_layers": count(component.entries, "single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": _shape(component, "txt_in.weight")[1],
        "pooled_projection_dim": _shape(component, "vector_in.in_layer.weight")[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in component.entries,
        "axes_dims_rope": rope_axes(head),
    }


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Return how a head's dimensions are shared among the three axes of the position ids.

    It is not in the weights. FLUX.1 has 128 and (16, 56, 56): an eighth for the first axis, the
    rest halved. Smaller heads take the smallest even first axis from an eighth up that leaves two
    even halves: 16 gives (4, 6, 6).
    """
    first = max(2, head_dim // 8 // 2 * 2)
    while (head_dim - first) % 4:
        first += 2
    rest = (head_dim - first) // 2
    return first, rest, rest


def vae_config(component: Component) -> dict[str, Any]:
    """Return the config diffusers' AutoencoderKL needs for these weights."""
    levels = count(component.entries, "encoder.down.")
    widths = [_shape(component, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    return {
        "in_channels": _shape(component, "encoder.conv_in.weight")[1],
        "out_channels": _shape(component, "decoder.conv_out.weight")[0],
        "latent_channels": _shape(component, "decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": count(component.entries, "encoder.down.0.block."),
        "norm_num_groups": GROUPS,
        "sample_size": 1024,
        "scaling_factor": VAE_SCALE,
        "shift_factor": VAE_SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "force_upcast": True,
    }


def shortcuts(component: Component) -> frozenset[str]:
    """Return the residual blocks of the autoencoder that change the number of channels."""
    mark = ".nin_shortcut.weight"
    return frozenset(name.removesuffix(mark) for name in component.entries if name.endswith(mark))


def count(names: Iterable[str], prefix: str) -> int:
    """Return how many numbers follow a prefix: blocks of a list, levels of a pyramid."""
    found = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    return len(found)


def _shape(component: Component, name: str) -> tuple[int, ...]:
    try:
        return component.entries[name].shape
    except KeyError:
        raise CheckpointIncompleteError(
            f"the {component.name} lacks a tensor that every FLUX.1 has",
            seen=f"{component.files[0]}: no {name}",
        ) from None
