"""Kinds of network that families share: how each is made, named on disk, checked and counted."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from danqing.models.kinds.base import NetworkKind

KINDS = {
    "clip": "clip.Clip",
    "clip_projection": "clip.ClipWithProjection",
    "t5": "t5.T5",
    "qwen_vl": "qwen_vl.QwenVL",
    "flux_transformer": "flux_transformer.FluxTransformer",
    "sd3_transformer": "sd3_transformer.SD3Transformer",
    "kl": "kl.AutoencoderKL",
}
"""Module and class of each kind; a family may have kinds of its own (`Model.own_kinds`)."""


def kind_of(name: str) -> NetworkKind:
    """Return a kind by the name that slots use."""
    module, _, leaf = KINDS[name].partition(".")
    kind: type[NetworkKind] = getattr(importlib.import_module(f"{__name__}.{module}"), leaf)
    return kind()
