"""Configs of DeepGen's networks, where the weights came without: read off their shapes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from danqing.errors import CheckpointDamagedError, CheckpointIncompleteError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from danqing.weights import Component

HEAD = 64
EPSILON = 1e-6
"""Of the released connector: channels of a head, and what its norms add. Shapes tell neither."""
PATCH = 2
CONNECTOR_PREFIXES = ("connector.layers.", "encoder.layers.", "layers.")
"""What the names of the connector's layers begin with; the released file is thought to have the
first."""
RELEASED_SPLIT = (628, 196)
"""Tensors in the two files of the released language model, the adapters merged."""
_FIRST_SAVED = (4, 49)
"""transformers' version in which Qwen2.5-VL's classes appeared."""
MERGED = "danqing_merged"
"""Key danqing writes into the config of a language model whose adapters it merged."""


def layers_prefix(component: Component) -> str:
    """Return what the names of the connector's layers begin with."""
    names = component.entries
    return next(
        (prefix for prefix in CONNECTOR_PREFIXES if any(n.startswith(prefix) for n in names)),
        CONNECTOR_PREFIXES[0],
    )


def connector_config(component: Component, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return sizes read off the shapes; heads and epsilon from the config, or the released ones.

    Args:
        component: the connector.
        given: its config, checked.

    Raises:
        CheckpointDamagedError: the config does not fit the tensors.
    """
    nested = given.get("connector")
    inner: Mapping[str, Any] = nested if isinstance(nested, dict) else given
    prefix = layers_prefix(component)
    hidden, stacked = _shape(component, "projector_1.weight", 2)
    queries, width = _shape(component, "meta_queries", 2)
    heads = inner.get("num_attention_heads", hidden // HEAD)
    epsilon = inner.get("layer_norm_eps", EPSILON)
    if hidden % heads:
        raise CheckpointDamagedError(
            "the connector's heads do not divide its width",
            seen=f"{component.folder}: {heads} heads, width {hidden}",
            hint="config.json in the connector's folder says num_attention_heads",
        )
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": _shape(component, f"{prefix}0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(component, prefix),
        "num_attention_heads": heads,
        "layer_norm_eps": epsilon,
        "num_queries": queries,
        "query_size": width,
        "input_size": stacked,
        "pooled_projection_dim": _shape(component, "projector_2.weight", 2)[0],
        "joint_attention_dim": _shape(component, "projector_3.weight", 2)[0],
    }
    for key, size in sizes.items():
        if inner.get(key, size) != size:
            raise CheckpointDamagedError(
                "the connector's config does not fit its tensors",
                seen=f"{component.folder}: {key} is {inner[key]}, of the tensors {size}",
            )
    return sizes


TRANSFORMER_COUNTS = ("num_layers", "pos_embed_max_size", "dual_attention_layers")
"""The keys of the transformer's config that say how many layers and places there are."""


def transformer_config(component: Component) -> dict[str, Any]:
    """Return the config diffusers' SD3Transformer2DModel needs for these weights.

    The table of places is square, and a file holds it; `sample_size` is SD3.5-medium's and changes
    nothing once the table is read.
    """
    inner, channels, patch, _ = _shape(component, "pos_embed.proj.weight", 4)
    places = _shape(component, "pos_embed.pos_embed", 3)[1]
    head = _shape(component, "transformer_blocks.0.attn.norm_q.weight", 1)[0]
    blocks = _count(component, "transformer_blocks.")
    dual = [
        block
        for block in range(blocks)
        if f"transformer_blocks.{block}.attn2.to_q.weight" in component.entries
    ]
    caption, joint = _shape(component, "context_embedder.weight", 2)
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": _shape(component, "proj_out.weight", 2)[0] // patch**2,
        "num_layers": blocks,
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "joint_attention_dim": joint,
        "caption_projection_dim": caption,
        "pooled_projection_dim": _shape(
            component, "time_text_embed.text_embedder.linear_1.weight", 2
        )[1],
        "pos_embed_max_size": math.isqrt(places),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm",
    }


def vlm_counts(
    component: Component,
    config: Mapping[str, Any],
    styles: Sequence[tuple[str, Mapping[str, str]]],
) -> dict[str, Any]:
    """Return how many layers the language model's tensors are of, by dotted key of its config.

    Args:
        component: the language model.
        config: its config, checked: flat before transformers 4.52, with a table of the text's
            since.
        styles: how its tensors' names may begin, and what ours begin with there.
    """
    names = component.entries
    begin = next((table for start, table in styles if any(n.startswith(start) for n in names)), {})
    text, visual = begin.get("language_model.", "language_model."), begin.get("visual.", "visual.")
    prefix = "text_config." if config.get("text_config") else ""
    return {
        f"{prefix}num_hidden_layers": _count(component, f"{text}layers."),
        "vision_config.depth": _count(component, f"{visual}blocks."),
    }


def check_heads(config: Mapping[str, Any], place: Path) -> None:
    """See that the language model's heads divide its widths, and its rotary positions fill a head.

    Raises:
        CheckpointDamagedError: they do not.
    """
    text = config.get("text_config") or config
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    sections = rope.get("mrope_section")
    rows = (
        ("text", text.get("hidden_size"), text.get("num_attention_heads"), sections),
        (
            "vision",
            (config.get("vision_config") or {}).get("hidden_size"),
            (config.get("vision_config") or {}).get("num_heads"),
            None,
        ),
    )
    for name, width, heads, parts in rows:
        if width is None or heads is None:
            continue
        if width % heads or (width // heads) % 4:
            raise CheckpointDamagedError(
                f"the {name} heads do not divide the language model's width",
                seen=f"{place}: {heads} heads, width {width}",
                allowed="heads of a multiple of 4 channels",
            )
        if parts is not None and 2 * sum(parts) != width // heads:
            raise CheckpointDamagedError(
                "mrope_section does not fill a head of the language model",
                seen=f"{place}: {list(parts)}, for heads of {width // heads}",
                allowed=f"three numbers, {width // heads // 2} together",
            )


def looks_stock(vlm: Component) -> bool:
    """Say whether a language model is Qwen's own release rather than DeepGen's.

    Qwen's config names a transformers version in which the model's classes did not exist yet; what
    was saved with adapters merged names a later one, or lies in the two files DeepGen released.
    """
    if vlm.adapters or MERGED in (vlm.config or {}):
        return False
    parts = str((vlm.config or {}).get("transformers_version", "")).split(".")[:2]
    if not all(part.isdigit() for part in parts) or len(parts) < 2:  # noqa: PLR2004
        return False
    by_file = [sum(e.file == file for e in vlm.entries.values()) for file in vlm.files]
    return tuple(map(int, parts)) < _FIRST_SAVED and tuple(by_file) != RELEASED_SPLIT


def _count(component: Component, prefix: str) -> int:
    names = component.entries
    return len({n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)})


def _shape(component: Component, name: str, sides: int) -> tuple[int, ...]:
    entry = component.entries.get(name)
    if entry is None:
        raise CheckpointIncompleteError(
            f"the {component.name} lacks a tensor that every DeepGen has",
            seen=f"{component.files[0]}: no {name}",
        )
    if len(entry.shape) != sides or not all(entry.shape):
        raise CheckpointDamagedError(
            f"a tensor of the {component.name} has an impossible shape",
            seen=f"{component.files[0]}: {name} is {list(entry.shape)}",
        )
    return entry.shape
