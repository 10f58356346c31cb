"""Qwen2.5-VL: the language model with its vision tower, as transformers has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from danqing.errors import CheckpointDamagedError
from danqing.models import config_tables
from danqing.models.kinds.base import NetworkKind, count
from danqing.networks.loading import Row, identity_rows
from danqing.networks.of_transformers import fill_rotary_tables

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from danqing.weights import Component

STYLES: tuple[tuple[str, Mapping[str, str]], ...] = (
    (
        "model.language_model.",
        {"language_model.": "model.language_model.", "visual.": "model.visual."},
    ),
    ("language_model.", {}),
    ("model.", {"language_model.": "model.", "visual.": "visual."}),
)
"""How names of the language model's tensors begin on disk, and what ours begin with there:
transformers from 4.52 on, without the outer name, and before 4.52."""


class QwenVL(NetworkKind):
    """The model without its head over the vocabulary."""

    table: ClassVar[config_tables.Kind] = config_tables.QWEN_VL
    library: ClassVar[str] = "transformers"

    def check_values(self, values: Mapping[str, Any], place: Path) -> None:
        """Check that heads divide the widths, and that rotary positions fill a head."""
        text = values.get("text_config") or values
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        sections = rope.get("mrope_section")
        rows = (
            ("text", text.get("hidden_size"), text.get("num_attention_heads"), sections),
            (
                "vision",
                (values.get("vision_config") or {}).get("hidden_size"),
                (values.get("vision_config") or {}).get("num_heads"),
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

    def counts(self, part: Component, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the layers of text and vision.

        A config is flat before transformers 4.52, and has a table of the text's since.
        """
        names = part.entries
        begin = next(
            (table for start, table in STYLES if any(n.startswith(start) for n in names)), {}
        )
        text = begin.get("language_model.", "language_model.")
        visual = begin.get("visual.", "visual.")
        prefix = "text_config." if values.get("text_config") else ""
        return {
            f"{prefix}num_hidden_layers": count(part, f"{text}layers."),
            "vision_config.depth": count(part, f"{visual}blocks."),
        }

    def make(self, values: Mapping[str, Any]) -> Any:
        """Make transformers' Qwen2_5_VLModel, its tables of rotary positions filled in."""
        from transformers import AutoModel, Qwen2_5_VLConfig

        whole = Qwen2_5_VLConfig.from_dict(dict(values))
        model = AutoModel.from_config(whole, attn_implementation="sdpa")
        for part in (model.language_model, model.visual):
            fill_rotary_tables(part)
        return model

    def rows(
        self,
        part: Component,
        values: Mapping[str, Any],  # noqa: ARG002
        shapes: Mapping[str, Any],
    ) -> Iterable[Row]:
        """Match names as transformers writes them from 4.52 on, and before."""
        for start, renamed in STYLES:
            if any(name.startswith(start) for name in part.entries):
                return [Row(_renamed(name, renamed), (name,)) for name in shapes]
        return identity_rows(shapes)

    def published(self, shapes: Mapping[str, Any]) -> Iterable[Row]:
        """Use the names that every transformers reads."""
        return [Row(name.replace("language_model.", "model.", 1), (name,)) for name in shapes]

    def ignored(self, name: str) -> bool:
        """Ignore the head: it is tied to the embeddings, and not needed."""
        return name == "lm_head.weight"

    def finish(self, module: Any, device: torch.device, dtype: torch.dtype) -> None:  # noqa: ARG002
        """Multiply patches instead of convolving them."""
        module.visual.patch_embed.proj = PatchLinear(module.visual.patch_embed.proj)

    def vocabulary(self, config: Any) -> int:
        """Return how many tokens the text's table has."""
        return int(config.text_config.vocab_size)

    def numbers(self, config: Any) -> int:
        """Return what a gated perceptron holds for a token."""
        return int(config.text_config.intermediate_size) * 6


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


class PatchLinear(nn.Module):
    """The vision tower's first layer, a 3-D convolution whose stride is its kernel, as a product.

    The same numbers in another order of summation; convolutions in 3-D are slow, or missing, in
    bfloat16 on many devices.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        """Take over the weight."""
        super().__init__()
        self.weight = convolution.weight

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Map (patches, channels, frames, rows, columns) to (patches, width)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1))
