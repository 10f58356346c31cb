"""Configs of DeepGen's networks, where the weights came without: read off their shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing.errors import CheckpointDamagedError
from danqing.models.kinds.base import count, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from danqing.weights import Component

HEAD = 64
EPSILON = 1e-6
"""Of the released connector: channels of a head, and what its norms add. Shapes tell neither."""
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
    hidden, stacked = shape_of(component, "projector_1.weight", 2)
    queries, width = shape_of(component, "meta_queries", 2)
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
        "intermediate_size": shape_of(component, f"{prefix}0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": count(component, prefix),
        "num_attention_heads": heads,
        "layer_norm_eps": epsilon,
        "num_queries": queries,
        "query_size": width,
        "input_size": stacked,
        "pooled_projection_dim": shape_of(component, "projector_2.weight", 2)[0],
        "joint_attention_dim": shape_of(component, "projector_3.weight", 2)[0],
    }
    for key, size in sizes.items():
        if inner.get(key, size) != size:
            raise CheckpointDamagedError(
                "the connector's config does not fit its tensors",
                seen=f"{component.folder}: {key} is {inner[key]}, of the tensors {size}",
            )
    return sizes


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
