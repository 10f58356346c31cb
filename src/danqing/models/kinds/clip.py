"""CLIP's text encoder, without and with the projection behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from danqing.models import config_tables
from danqing.models.kinds.base import NetworkKind, count, side
from danqing.networks.loading import Row
from danqing.networks.of_transformers import make_encoder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from danqing.weights import Component

TOKENS = 77
"""What every released CLIP reads."""
HEAD = 64
PREFIX = "text_model."
_PROJECTION = "text_projection.weight"


class Clip(NetworkKind):
    """The encoder alone; FLUX.1 takes its pooled state."""

    table: ClassVar[config_tables.Kind] = config_tables.CLIP_TEXT
    library: ClassVar[str] = "transformers"
    class_name: ClassVar[str] = "CLIPTextModel"
    counted: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)
    extras: ClassVar[tuple[str, ...]] = (
        "vision_model.", "visual_projection.", "text_projection.", "logit_scale",
    )  # fmt: skip

    def own_config(self, part: Component) -> Mapping[str, Any]:
        """Return, of the config of a whole CLIP, that of the half that reads."""
        given = part.config or {}
        inner = given.get("text_config")
        return inner if given.get("model_type") == "clip" and isinstance(inner, dict) else given

    def derive(self, part: Component) -> dict[str, Any]:
        """Return the config that the shapes tell.

        The number of heads is not in the weights: 64 dimensions to a head, as in all of OpenAI's; a
        toy narrower than that has 8.
        """
        prefix = PREFIX if any(name.startswith(PREFIX) for name in part.entries) else ""
        embedding = f"{prefix}embeddings.token_embedding.weight"
        vocabulary, hidden = (side(part, embedding, axis) for axis in (0, 1))
        positions = side(part, f"{prefix}embeddings.position_embedding.weight", 0)
        return {
            "model_type": "clip_text_model",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": side(part, f"{prefix}encoder.layers.0.mlp.fc1.weight", 0),
            "num_hidden_layers": count(part, f"{prefix}encoder.layers."),
            "num_attention_heads": hidden // (HEAD if hidden >= HEAD else 8),
            "max_position_embeddings": positions,
            "hidden_act": "quick_gelu",
            "projection_dim": hidden,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        }

    def make(self, values: Mapping[str, Any]) -> Any:
        """Make transformers' CLIPTextModel."""
        from transformers import CLIPTextModel

        return _made(CLIPTextModel, values)

    def rows(
        self,
        part: Component,
        values: Mapping[str, Any],  # noqa: ARG002
        shapes: Mapping[str, Any],
    ) -> Iterable[Row]:
        """Match names with or without `text_model.`: transformers dropped the prefix in 5.6."""
        prefix = PREFIX if any(name.startswith(PREFIX) for name in part.entries) else ""
        for name in shapes:
            bare = name.removeprefix(PREFIX)
            yield Row(bare if bare == _PROJECTION else prefix + bare, (name,))

    def published(self, shapes: Mapping[str, Any]) -> Iterable[Row]:
        """Keep the prefix that transformers 5 left out of its module."""
        for name in shapes:
            bare = name.removeprefix(PREFIX)
            if "position_ids" not in name:
                yield Row(bare if bare == _PROJECTION else PREFIX + bare, (name,))

    def ignored(self, name: str) -> bool:
        """Ignore the half that sees, and a table of numbers that older versions saved."""
        return name.startswith(self.extras) or name.endswith("position_ids")

    def numbers(self, config: Any) -> int:
        """Return what a perceptron holds for a token."""
        return int(config.intermediate_size) * 4


class ClipWithProjection(Clip):
    """The encoder with its projection: SD3 takes its second last states and the projected one."""

    class_name: ClassVar[str] = "CLIPTextModelWithProjection"
    extras: ClassVar[tuple[str, ...]] = ("vision_model.", "visual_projection.", "logit_scale")

    def derive(self, part: Component) -> dict[str, Any]:
        """Return the config that the shapes tell."""
        return {**super().derive(part), "projection_dim": side(part, _PROJECTION, 0)}

    def make(self, values: Mapping[str, Any]) -> Any:
        """Make transformers' CLIPTextModelWithProjection."""
        from transformers import CLIPTextModelWithProjection

        return _made(CLIPTextModelWithProjection, values)

    def read(
        self, encoder: Any, ids: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the second last states, (1, tokens, width), and the projected one, (1, width).

        Args:
            encoder: transformers' CLIPTextModelWithProjection.
            ids: of the tokens.
            device: where the two are put.
        """
        out = encoder(ids.to(encoder.device), output_hidden_states=True)
        return out.hidden_states[-2].to(device), out.text_embeds.to(device)


def _made(network: Any, values: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextConfig

    return make_encoder(network, CLIPTextConfig, values)
