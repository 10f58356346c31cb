"""Configs of FLUX.1's networks, read off the shapes of the BFL release: it has no config files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing.errors import CheckpointDamagedError, CheckpointIncompleteError
from danqing.models.flux.keys import llama_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from danqing.weights import Component

VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159
"""Of the FLUX.1 autoencoder: latents = scale * (z - shift). BFL, flux/util.py."""
GROUPS = 32
CLIP_HEAD = 64


def schedule_config(*, guided: bool) -> dict[str, Any]:
    """Return the noise schedule: shifted by resolution except in schnell. BFL, flux/sampling.py."""
    shifted = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
    shifted |= {"max_image_seq_len": 4096, "shift": 3.0, "use_dynamic_shifting": True}
    plain = {"shift": 1.0, "use_dynamic_shifting": False}
    return {"num_train_timesteps": 1000, **(shifted if guided else plain)}


def transformer_config(component: Component) -> dict[str, Any]:
    """Return the config diffusers' FluxTransformer2DModel needs for these weights."""
    if component.style == "diffusers":
        return _diffusers_transformer_config(component)
    hidden, inputs = (_side(component, "img_in.weight", axis) for axis in (0, 1))
    head = _side(component, "double_blocks.0.img_attn.norm.query_norm.scale", 0)
    return {
        "patch_size": 1,
        "in_channels": inputs,
        "num_layers": count(component.entries, "double_blocks."),
        "num_single_layers": count(component.entries, "single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": _side(component, "txt_in.weight", 1),
        "pooled_projection_dim": _side(component, "vector_in.in_layer.weight", 1),
        "guidance_embeds": "guidance_in.in_layer.weight" in component.entries,
        "axes_dims_rope": rope_axes(head),
    }


def _diffusers_transformer_config(component: Component) -> dict[str, Any]:
    hidden, inputs = (_side(component, "x_embedder.weight", axis) for axis in (0, 1))
    head = _side(component, "transformer_blocks.0.attn.norm_q.weight", 0)
    embedder = "time_text_embed.{}_embedder.linear_1.weight"
    return {
        "patch_size": 1,
        "in_channels": inputs,
        "num_layers": count(component.entries, "transformer_blocks."),
        "num_single_layers": count(component.entries, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": _side(component, "context_embedder.weight", 1),
        "pooled_projection_dim": _side(component, embedder.format("text"), 1),
        "guidance_embeds": embedder.format("guidance") in component.entries,
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


def check_axes(config: Mapping[str, Any], place: Path) -> None:
    """See that the axes of the position ids fill a head.

    Raises:
        CheckpointDamagedError: they do not.
    """
    axes, head = config.get("axes_dims_rope", (16, 56, 56)), config.get("attention_head_dim", 128)
    if sum(axes) != head or any(axis % 2 for axis in axes):
        raise CheckpointDamagedError(
            "axes_dims_rope does not fill a head of the transformer",
            seen=f"{place}: {list(axes)}, for heads of {head}",
            allowed=f"three even numbers, {head} together",
        )


def vae_config(component: Component) -> dict[str, Any]:
    """Return the config diffusers' AutoencoderKL needs for these weights."""
    down, block = "encoder.down", "block"
    if component.style == "diffusers":
        down, block = "encoder.down_blocks", "resnets"
    levels = count(component.entries, f"{down}.")
    widths = [_side(component, f"{down}.{i}.{block}.0.conv1.weight", 0) for i in range(levels)]
    return {
        "in_channels": _side(component, "encoder.conv_in.weight", 1),
        "out_channels": _side(component, "decoder.conv_out.weight", 0),
        "latent_channels": _side(component, "decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": count(component.entries, f"{down}.0.{block}."),
        "norm_num_groups": GROUPS,
        "sample_size": 1024,
        "scaling_factor": VAE_SCALE,
        "shift_factor": VAE_SHIFT,
        "use_quant_conv": "quant_conv.weight" in component.entries,
        "use_post_quant_conv": "post_quant_conv.weight" in component.entries,
        "mid_block_add_attention": True,
        "force_upcast": True,
    }


def clip_config(component: Component) -> dict[str, Any]:
    """Return the config of a CLIP text encoder that came without one.

    The number of heads is not in the weights: 64 dimensions to a head, as in all of OpenAI's; a toy
    narrower than that has 8.
    """
    prefix = "text_model." if any(n.startswith("text_model.") for n in component.entries) else ""
    embedding = f"{prefix}embeddings.token_embedding.weight"
    vocabulary, hidden = (_side(component, embedding, axis) for axis in (0, 1))
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": _side(component, f"{prefix}encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": count(component.entries, f"{prefix}encoder.layers."),
        "num_attention_heads": hidden // (CLIP_HEAD if hidden >= CLIP_HEAD else 8),
        "max_position_embeddings": _side(
            component, f"{prefix}embeddings.position_embedding.weight", 0
        ),
        "hidden_act": "quick_gelu",
        "projection_dim": hidden,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def t5_config(component: Component) -> dict[str, Any]:
    """Return the config of a T5 v1.1 encoder that came without one."""
    own = llama_name if component.style == "llama.cpp" else str
    block = "encoder.block.0.layer"
    tied = ("shared.weight", "encoder.embed_tokens.weight")
    embedding = next((own(name) for name in tied if own(name) in component.entries), own(tied[0]))
    vocabulary, hidden = (_side(component, embedding, axis) for axis in (0, 1))
    bias = f"{block}.0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = (_side(component, own(bias), axis) for axis in (0, 1))
    inner = _side(component, own(f"{block}.0.SelfAttention.q.weight"), 0)
    layers = "enc.blk." if component.style == "llama.cpp" else "encoder.block."
    return {
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": hidden,
        "d_kv": inner // max(heads, 1),
        "d_ff": _side(component, own(f"{block}.1.DenseReluDense.wi_0.weight"), 0),
        "num_layers": count(component.entries, layers),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def shortcuts(targets: Iterable[str], *, levels: int) -> frozenset[str]:
    """Return the BFL names of the residual blocks that change the number of channels.

    Args:
        targets: names of diffusers' module.
        levels: resolutions.
    """
    mark = ".conv_shortcut.weight"
    found = set()
    for name in targets:
        if name.endswith(mark):
            side, _, level, _, block = name.removesuffix(mark).split(".")
            number = int(level) if side == "encoder" else levels - 1 - int(level)
            found.add(f"{side}.{'down' if side == 'encoder' else 'up'}.{number}.block.{block}")
    return frozenset(found)


DERIVED: dict[str, Callable[[Component], dict[str, Any]]] = {
    "text_encoder": clip_config,
    "text_encoder_2": t5_config,
    "transformer": transformer_config,
    "vae": vae_config,
}
"""How to tell a network's config from the shapes of its weights."""


COUNTS: dict[str, tuple[str, ...]] = {
    "text_encoder": ("num_hidden_layers",),
    "text_encoder_2": ("num_layers",),
    "transformer": ("num_layers", "num_single_layers"),
    "vae": ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block"),
}
"""The keys of each config that say how many layers there are."""


def count(names: Iterable[str], prefix: str) -> int:
    """Return how many numbers follow a prefix: blocks of a list, levels of a pyramid."""
    found = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    return len(found)


def _side(component: Component, name: str, axis: int) -> int:
    """Return one side of a tensor, at least 1."""
    entry = component.entries.get(name)
    if entry is None:
        raise CheckpointIncompleteError(
            f"the {component.name} lacks a tensor that every FLUX.1 has",
            seen=f"{component.files[0]}: no {name}",
        )
    if len(entry.shape) <= axis or not entry.shape[axis]:
        raise CheckpointDamagedError(
            f"a tensor of the {component.name} has an impossible shape",
            seen=f"{component.files[0]}: {name} is {list(entry.shape)}",
        )
    return entry.shape[axis]
