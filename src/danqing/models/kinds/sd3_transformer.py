"""The transformer of Stable Diffusion 3 and 3.5, in diffusers' names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from danqing.models import config_tables, flow
from danqing.models.kinds.base import Transformer, count, shape_of
from danqing.networks.of_diffusers import choose_by_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from danqing.weights import Component


HEAD = 64
"""Channels of a head; only the norms of 3.5 tell it."""


class SD3Transformer(Transformer):
    """Blocks with separate weights for text and image, some with a second attention."""

    table: ClassVar[config_tables.Kind] = config_tables.SD3_TRANSFORMER
    class_name: ClassVar[str] = "SD3Transformer2DModel"
    counted: ClassVar[tuple[str, ...]] = (
        "num_layers", "pos_embed_max_size", "dual_attention_layers",
    )  # fmt: skip

    def derive(self, part: Component) -> dict[str, Any]:
        """Return the config that the shapes tell.

        The table of places is square, and a file holds it; `sample_size` is SD3.5-medium's and
        changes nothing once the table is read.
        """
        inner, channels, patch, _ = shape_of(part, "pos_embed.proj.weight", 4)
        places = shape_of(part, "pos_embed.pos_embed", 3)[1]
        norm = "transformer_blocks.0.attn.norm_q.weight"
        head = shape_of(part, norm, 1)[0] if norm in part.entries else min(HEAD, inner)
        blocks = count(part, "transformer_blocks.")
        dual = [
            block
            for block in range(blocks)
            if f"transformer_blocks.{block}.attn2.to_q.weight" in part.entries
        ]
        caption, joint = shape_of(part, "context_embedder.weight", 2)
        return {
            "sample_size": 128,
            "patch_size": patch,
            "in_channels": channels,
            "out_channels": shape_of(part, "proj_out.weight", 2)[0] // patch**2,
            "num_layers": blocks,
            "attention_head_dim": head,
            "num_attention_heads": inner // head,
            "joint_attention_dim": joint,
            "caption_projection_dim": caption,
            "pooled_projection_dim": shape_of(
                part, "time_text_embed.text_embedder.linear_1.weight", 2
            )[1],
            "pos_embed_max_size": math.isqrt(places),
            "dual_attention_layers": dual,
            "qk_norm": "rms_norm" if norm in part.entries else None,
        }

    def make(self, values: Mapping[str, Any]) -> Any:
        """Make diffusers' SD3Transformer2DModel."""
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel.from_config(dict(values))

    def finish(self, module: Any, device: torch.device, dtype: torch.dtype) -> None:  # noqa: ARG002
        """Let its norms choose their kernel by where their input is."""
        choose_by_tensor(module)

    def flops(self, config: Any, elements: int, tokens: int) -> float:
        """Count the products of the blocks and of attention.

        A block has weights of its own for text and for image, about as many of each, so a token
        meets half of them.
        """
        attention = 4 * int(config.num_layers) * self.width(config) * tokens**2
        return elements * tokens + attention


def predictor(
    transformer: Any, context: torch.Tensor, pooled: torch.Tensor, timesteps: torch.Tensor
) -> flow.Predictor:
    """Return what predicts velocities with the transformer's own forward.

    Args:
        transformer: diffusers' SD3Transformer2DModel.
        context: of each row, (rows, tokens, joint width).
        pooled: of each row, (rows, pooled width).
        timesteps: of the steps.
    """
    times = [timestep.expand(len(context)) for timestep in timesteps]

    def velocity(latents: torch.Tensor, step: int) -> torch.Tensor:
        rows: torch.Tensor = transformer(latents, context, pooled, times[step], return_dict=False)[
            0
        ]
        return rows

    def embed(step: int) -> torch.Tensor:
        embedded: torch.Tensor = transformer.time_text_embed(times[step], pooled)
        return embedded

    return flow.Predictor(velocity, embed)
