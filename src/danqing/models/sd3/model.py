"""Stable Diffusion 3 as three stages (https://arxiv.org/abs/2403.03206)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import pad

from danqing.models.flow import Predictor, in_rows
from danqing.models.kinds import sd3_transformer, t5
from danqing.models.kinds.clip import TOKENS, ClipWithProjection
from danqing.models.model import Conditioning, Model, Tokens, prompts_of
from danqing.models.sd3 import SLOTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from danqing.models.kinds.base import NetworkKind
    from danqing.models.model import Batch, Modules
    from danqing.request import Resolved

CLIP = ClipWithProjection()


class SD3Model(Model):
    """A Stable Diffusion 3 or 3.5 of any size."""

    slots = SLOTS
    encode_reads = ("prompt", "negative_prompt", "guidance_scale", "max_sequence_length")
    own_kinds: ClassVar[Mapping[str, NetworkKind]] = {"clip": CLIP}
    known_values: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "text_encoder_2": {"hidden_act": "gelu"},
        "vae": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        "scheduler": {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False},
    }

    def fits(self) -> Iterable[tuple[str, str, int, int]]:
        """Yield the widths that must agree."""
        config, wanted = self.library_config, self.library_config("transformer")
        rest = wanted.pooled_projection_dim - config("text_encoder").projection_dim
        context = config("text_encoder_3").d_model
        yield "text_encoder_2", "pooled", config("text_encoder_2").projection_dim, rest
        yield "text_encoder_3", "context", context, wanted.joint_attention_dim
        yield "vae", "latent", config("vae").latent_channels, wanted.in_channels

    def count(self, request: Resolved) -> Tokens:
        """Count the tokens of CLIP and T5, to which prompts are padded, and patches of latents."""
        limit = request.max_sequence_length
        image = self.image_tokens(request.height, request.width)
        rows, encoders = len(prompts_of(request)), {"text_encoder_3": limit}
        return Tokens(text=TOKENS + limit, image=image, rows=rows, encoders=encoders)

    def encode(self, modules: Modules, request: Resolved) -> tuple[Conditioning, tuple[str, ...]]:
        """Read the prompt and, under guidance, the negative one, each on its own."""
        limit, t5_tokenizer = request.max_sequence_length, self.tokenizer("text_encoder_3")
        rows = [self._read(modules, text, limit) for text in prompts_of(request)]
        embeds, pooled = (torch.cat(column) for column in zip(*rows, strict=True))
        notes = t5.reading_notes(t5_tokenizer, request.prompt, limit)
        return Conditioning(prompt_embeds=embeds, pooled_embeds=pooled), notes

    def _read(self, modules: Modules, text: str, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return CLIP's states with T5's behind them, and CLIP's projections."""
        encoder, ids = modules["text_encoder_3"], self.tokenize("text_encoder_3", text, limit)
        embeds = encoder(ids.to(encoder.device))[0]
        clips = [
            CLIP.read(modules[name], self.tokenize(name, text, TOKENS), embeds.device)
            for name in ("text_encoder", "text_encoder_2")
        ]
        states, pooled = (torch.cat(column, dim=-1) for column in zip(*clips, strict=True))
        wide = pad(states, (0, embeds.shape[-1] - states.shape[-1]))
        return torch.cat([wide, embeds.to(wide)], dim=-2), pooled

    def predictor(self, modules: Modules, conditioning: Conditioning, batch: Batch) -> Predictor:
        """Call the transformer, all rows together."""
        context = in_rows(conditioning.prompt_embeds, batch.size)
        pooled = in_rows(conditioning.pooled_embeds, batch.size)
        transformer = modules["transformer"]
        return sd3_transformer.predictor(transformer, context, pooled, batch.timesteps)
