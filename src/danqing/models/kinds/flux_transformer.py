"""The transformer of FLUX.1, in diffusers' names and in those of the BFL release.

The key map was read off the two implementations' module trees; the order of rows is that of the
modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from danqing.errors import CheckpointDamagedError
from danqing.models import config_tables
from danqing.models.kinds.base import Transformer, count, side
from danqing.models.kinds.positions import Positions
from danqing.networks.loading import Row, both, identity_rows
from danqing.networks.of_diffusers import set_attention_backend

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from danqing.weights import Component

ATTENTION_BACKEND = "native"
"""diffusers' name for torch's scaled_dot_product_attention, which every device implements."""
PATCH = 2
"""Latents are cut into patches of 2 x 2 before they reach it; its own patches are single tokens."""


class FluxTransformer(Transformer):
    """Blocks with separate streams for text and image, then blocks with one."""

    table: ClassVar[config_tables.Kind] = config_tables.FLUX_TRANSFORMER
    class_name: ClassVar[str] = "FluxTransformer2DModel"
    counted: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")

    def derive(self, part: Component) -> dict[str, Any]:
        """Return the config that the shapes tell."""
        style = _STYLES["bfl" if part.style == "bfl" else "diffusers"]
        hidden, inputs = (side(part, style["input"], axis) for axis in (0, 1))
        head = side(part, style["head"], 0)
        return {
            "patch_size": 1,
            "in_channels": inputs,
            "num_layers": count(part, style["double"]),
            "num_single_layers": count(part, style["single"]),
            "attention_head_dim": head,
            "num_attention_heads": hidden // head,
            "joint_attention_dim": side(part, style["text"], 1),
            "pooled_projection_dim": side(part, style["pooled"], 1),
            "guidance_embeds": style["guidance"] in part.entries,
            "axes_dims_rope": rope_axes(head),
        }

    def check_values(self, values: Mapping[str, Any], place: Path) -> None:
        """Check that the axes of the position ids fill a head."""
        axes = values.get("axes_dims_rope", (16, 56, 56))
        head = values.get("attention_head_dim", 128)
        if sum(axes) != head or any(axis % 2 for axis in axes):
            raise CheckpointDamagedError(
                "axes_dims_rope does not fill a head of the transformer",
                seen=f"{place}: {list(axes)}, for heads of {head}",
                allowed=f"three even numbers, {head} together",
            )

    def make(self, values: Mapping[str, Any]) -> Any:
        """Make diffusers' FluxTransformer2DModel, with rotary positions made once."""
        from diffusers import FluxTransformer2DModel

        transformer = FluxTransformer2DModel.from_config(dict(values))
        set_attention_backend(transformer, ATTENTION_BACKEND)
        transformer.pos_embed = Positions(transformer.pos_embed)
        return transformer

    def rows(
        self, part: Component, values: Mapping[str, Any], shapes: Mapping[str, Any]
    ) -> Iterable[Row]:
        """Return the key map of the BFL release, or of diffusers' own names."""
        if part.style != "bfl":
            return identity_rows(shapes)
        return transformer_rows(
            double=values["num_layers"],
            single=values["num_single_layers"],
            guided=values["guidance_embeds"],
        )

    def patch(self, config: Any) -> int:  # noqa: ARG002
        """Return the side of a patch, in latents."""
        return PATCH

    def flops(self, config: Any, elements: int, tokens: int) -> float:
        """Count the products of the blocks and of attention."""
        blocks = int(config.num_layers) + int(config.num_single_layers)
        return 2 * elements * tokens + 4 * blocks * self.width(config) * tokens**2


_STYLES: Mapping[str, Mapping[str, str]] = {
    "bfl": {
        "input": "img_in.weight",
        "head": "double_blocks.0.img_attn.norm.query_norm.scale",
        "double": "double_blocks.",
        "single": "single_blocks.",
        "text": "txt_in.weight",
        "pooled": "vector_in.in_layer.weight",
        "guidance": "guidance_in.in_layer.weight",
    },
    "diffusers": {
        "input": "x_embedder.weight",
        "head": "transformer_blocks.0.attn.norm_q.weight",
        "double": "transformer_blocks.",
        "single": "single_transformer_blocks.",
        "text": "context_embedder.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
        "guidance": "time_text_embed.guidance_embedder.linear_1.weight",
    },
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


def transformer_rows(*, double: int, single: int, guided: bool) -> Iterator[Row]:
    """Yield the rows of the transformer.

    Args:
        double: number of blocks with separate text and image streams.
        single: number of blocks with one stream.
        guided: whether there is a guidance embedder.
    """
    yield from both("img_in", "x_embedder")
    yield from both("txt_in", "context_embedder")
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if guided:
        embedders["guidance_in"] = "guidance_embedder"
    for source, target in embedders.items():
        yield from both(f"{source}.in_layer", f"time_text_embed.{target}.linear_1")
        yield from both(f"{source}.out_layer", f"time_text_embed.{target}.linear_2")
    for i in range(double):
        yield from _double_rows(f"double_blocks.{i}", f"transformer_blocks.{i}")
    for i in range(single):
        yield from _single_rows(f"single_blocks.{i}", f"single_transformer_blocks.{i}")
    yield from both("final_layer.linear", "proj_out")
    # BFL keeps (shift, scale), diffusers (scale, shift)
    yield from both("final_layer.adaLN_modulation.1", "norm_out.linear", change="swap_halves")


def _double_rows(source: str, target: str) -> Iterator[Row]:
    attn = f"{target}.attn"
    yield from both(f"{source}.img_mod.lin", f"{target}.norm1.linear")
    yield from both(f"{source}.txt_mod.lin", f"{target}.norm1_context.linear")
    yield from both(f"{source}.img_attn.qkv", *(f"{attn}.to_{part}" for part in "qkv"))
    yield from both(f"{source}.txt_attn.qkv", *(f"{attn}.add_{part}_proj" for part in "qkv"))
    for stream, prefix in (("img", "norm_"), ("txt", "norm_added_")):
        norm = f"{source}.{stream}_attn.norm"
        yield Row(f"{norm}.query_norm.scale", (f"{attn}.{prefix}q.weight",))
        yield Row(f"{norm}.key_norm.scale", (f"{attn}.{prefix}k.weight",))
    yield from both(f"{source}.img_attn.proj", f"{attn}.to_out.0")
    yield from both(f"{source}.txt_attn.proj", f"{attn}.to_add_out")
    for stream, ff in (("img", "ff"), ("txt", "ff_context")):
        yield from both(f"{source}.{stream}_mlp.0", f"{target}.{ff}.net.0.proj")
        yield from both(f"{source}.{stream}_mlp.2", f"{target}.{ff}.net.2")


def _single_rows(source: str, target: str) -> Iterator[Row]:
    attn = f"{target}.attn"
    yield from both(f"{source}.modulation.lin", f"{target}.norm.linear")
    parts = (*(f"{attn}.to_{part}" for part in "qkv"), f"{target}.proj_mlp")
    yield from both(f"{source}.linear1", *parts)
    yield from both(f"{source}.linear2", f"{target}.proj_out")
    yield Row(f"{source}.norm.query_norm.scale", (f"{attn}.norm_q.weight",))
    yield Row(f"{source}.norm.key_norm.scale", (f"{attn}.norm_k.weight",))
