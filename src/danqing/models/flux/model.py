"""FLUX.1 as three stages, over the networks of diffusers and transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from danqing.models import flow
from danqing.models.flux import SLOTS, sampling
from danqing.models.kinds import clip, t5
from danqing.models.model import Conditioning, Model, Tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from danqing.models.model import Batch, Modules
    from danqing.models.slots import Slot
    from danqing.request import Resolved

CLIP_L_HEADS = 12
VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159
"""Of the FLUX.1 autoencoder: latents = scale * (z - shift). BFL, flux/util.py."""


class FluxModel(Model):
    """A FLUX.1 of any kind and size."""

    slots: ClassVar[tuple[Slot, ...]] = SLOTS
    encode_reads: ClassVar[tuple[str, ...]] = ("prompt", "max_sequence_length")

    def fits(self) -> Iterable[tuple[str, str, int, int]]:
        """Yield the widths that must agree: encoders of other models look the same."""
        config = self.library_config
        wanted = config("transformer")
        pooled, embeds = config("text_encoder").hidden_size, config("text_encoder_2").d_model
        latents = config("vae").latent_channels * sampling.PATCH**2
        yield "text_encoder", "pooled", pooled, wanted.pooled_projection_dim
        yield "text_encoder_2", "context", embeds, wanted.joint_attention_dim
        yield "vae", "packed", latents, wanted.in_channels

    def assumed(self, component: str) -> Mapping[str, Any]:
        """Return what the BFL release, which has no configs, leaves open."""
        return {
            "vae": {"scaling_factor": VAE_SCALE, "shift_factor": VAE_SHIFT},
            "scheduler": sampling.schedule_config(guided=self.spec.kind == "dev"),
        }.get(component, {})

    def assumptions(self) -> tuple[str, ...]:
        """Say where the BFL layout, which has no configs, left something open."""
        found = []
        if "scheduler" not in self.checkpoint.components:
            how = "shifted by resolution" if self.spec.kind == "dev" else "not shifted"
            found.append(f"the schedule is {how}, as FLUX.1's; the weights have no config of it")
        part = self.checkpoint.component
        axes = self.config_of("transformer").get("axes_dims_rope")
        if part("transformer").config is None and axes != (16, 56, 56):
            found.append(f"axes_dims_rope is {axes}, for heads of {sum(axes or ())}")
        if part("text_encoder").config is None:
            heads = self.config_of("text_encoder")["num_attention_heads"]
            if heads != CLIP_L_HEADS:
                found.append(f"CLIP has {heads} heads; its weights do not say how many")
        if part("vae").config is None and part("vae").style == "diffusers":
            found.append("the VAE's scale and shift are FLUX.1's; its weights have no config")
        return (*found, *super().assumptions())

    def count(self, request: Resolved) -> Tokens:
        """Count T5's tokens, to which the prompt is padded, and patches of latents."""
        text = request.max_sequence_length
        image = self.image_tokens(request.height, request.width)
        return Tokens(text=text, image=image, encoders={"text_encoder_2": text})

    def encode(self, modules: Modules, request: Resolved) -> tuple[Conditioning, tuple[str, ...]]:
        """Run CLIP for the pooled state and T5 for the sequence; padding is not masked."""
        clip_l, t5_xxl = modules["text_encoder"], modules["text_encoder_2"]
        dtype, limit = clip_l.dtype, request.max_sequence_length
        length = min(clip.TOKENS, clip_l.config.max_position_embeddings)
        clip_ids = self.tokenize("text_encoder", request.prompt, length)
        t5_ids = self.tokenize("text_encoder_2", request.prompt, limit)
        pooled = clip_l(clip_ids.to(clip_l.device), output_hidden_states=False).pooler_output
        embeds = t5_xxl(t5_ids.to(t5_xxl.device), output_hidden_states=False)[0]
        conditioning = Conditioning(prompt_embeds=embeds.to(dtype), pooled_embeds=pooled.to(dtype))
        tokenizer = self.tokenizer("text_encoder_2")
        return conditioning, t5.reading_notes(tokenizer, request.prompt, limit)

    def predictor(
        self, modules: Modules, conditioning: Conditioning, batch: Batch
    ) -> flow.Predictor:
        """Call the transformer with packed latents, position ids and, of a dev type, guidance."""
        transformer, count, request = modules["transformer"], batch.size, batch.request
        embeds = conditioning.prompt_embeds
        device, dtype, host = embeds.device, embeds.dtype, torch.device("cpu")
        _, _, height, width = self.latent_shape(request.height, request.width)
        text_ids = sampling.text_ids(embeds.shape[1], host)
        image_ids = sampling.image_ids(height // 2, width // 2, host)
        transformer.pos_embed.prepare(torch.cat([text_ids, image_ids]), device)
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.full(
                (count,), request.guidance_scale, dtype=torch.float32, device=device
            )
        pooled = conditioning.pooled_embeds.repeat(count, 1)
        constant = {
            "encoder_hidden_states": embeds.repeat(count, 1, 1),
            "pooled_projections": pooled,
            "guidance": guidance,
            "txt_ids": text_ids.to(device),
            "img_ids": image_ids.to(device),
            "return_dict": False,
        }
        times = [one.expand(count).to(dtype) / 1000 for one in batch.timesteps]
        scales = [] if guidance is None else [guidance]

        def velocity(latents: torch.Tensor, step: int) -> torch.Tensor:
            rows: torch.Tensor = transformer(
                hidden_states=latents, timestep=times[step], **constant
            )[0]
            return rows

        def embed(step: int) -> torch.Tensor:
            seen = [one.to(dtype) * 1000 for one in (times[step], *scales)]
            embedded: torch.Tensor = transformer.time_text_embed(*seen, pooled)
            return embedded

        return flow.Predictor(velocity, embed)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Cut latents into patches of 2 x 2."""
        return sampling.pack(latents)

    def unpack(self, latents: torch.Tensor, request: Resolved) -> torch.Tensor:
        """Undo `pack`."""
        _, _, height, width = self.latent_shape(request.height, request.width)
        return sampling.unpack(latents, height, width)

    def sigmas(self, steps: int) -> list[float]:
        """Return evenly spaced noise levels."""
        return sampling.base_sigmas(steps)
