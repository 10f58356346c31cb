"""FLUX.1 as three stages, over the networks of diffusers and transformers."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from danqing.errors import (
    TensorMismatchError,
)
from danqing.models import config_tables, flow, tokenizers
from danqing.models.config_tables import SCHEDULE, Config, read_config
from danqing.models.flux import SLOTS, configs, keys, sampling
from danqing.models.flux.positions import Positions
from danqing.models.networks import (
    Network,
    NetworksModel,
    attention_of,
    check_ids,
    decode_flops,
)
from danqing.networks.hoisting import hoisted, modulations
from danqing.networks.loading import Row, identity_rows, without_message
from danqing.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from danqing.models.base import Modules, OnStep
    from danqing.models.slots import Slot
    from danqing.request import Resolved
    from danqing.weights import Component

CLIP_TOKENS = 77
CLIP_L_HEADS = 12
ATTENTION_BACKEND = "native"
"""diffusers' name for torch's scaled_dot_product_attention, which every device implements."""

TOKEN_COPIES = 24
"""Numbers a block holds for each token and channel at its worst."""
PIXEL_COPIES = 8
"""Numbers the decoder holds for each pixel and channel of its last level."""
_CLIP_EXTRAS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
_T5_EXTRAS = ("decoder.", "lm_head.", "spiece_model")
_SHOWN = 100
_SHOWN_WORDS = 8
_SPELLED = 2
"""Letters; a short word may be spelled and yet be known."""
_READS_LETTERS = 10_000
"""Pieces; a vocabulary so large has learned from spelled words too, such as T5's 32,100."""
_WORD_START = "\u2581"
"""How sentencepiece writes the space before a word."""
_ONE_STEP = Request(prompt="a", num_inference_steps=1)
_ENCODERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
_KINDS = {
    "text_encoder": config_tables.CLIP_TEXT,
    "text_encoder_2": config_tables.T5_ENCODER,
    "transformer": config_tables.FLUX_TRANSFORMER,
    "vae": config_tables.AUTOENCODER,
}
_T5_TIED = ("shared.weight", "encoder.embed_tokens.weight")


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the prompt became.

    Attributes:
        prompt_embeds: T5's last hidden state, (1, tokens, 4096), padding included.
        pooled_embeds: CLIP's pooled state, (1, 768).
    """

    prompt_embeds: torch.Tensor
    pooled_embeds: torch.Tensor


class FluxModel(NetworksModel):
    """A FLUX.1 of any kind and size."""

    slots: ClassVar[tuple[Slot, ...]] = SLOTS
    tokenizer_kinds: ClassVar[Mapping[str, tokenizers.TokenizerKind]] = {
        "tokenizer": tokenizers.CLIP,
        "tokenizer_2": tokenizers.T5,
    }
    conditioning: ClassVar[type] = Conditioning
    encode_reads: ClassVar[tuple[str, ...]] = ("prompt", "max_sequence_length")

    def check_together(self) -> None:
        """Compare the networks' widths with each other, and tokenizers with their encoders."""
        for tokenizer, encoder in _ENCODERS.items():
            config: Any = self._checked[encoder].config
            self.check_vocabulary(tokenizer, encoder, config.vocab_size)
        _check_fit({name: module.config for name, module in self._checked.items()})

    def try_schedule(self) -> None:
        """Make a schedule of one step."""
        self._schedule(self.spec.resolve(_ONE_STEP), tokens=1, device=torch.device("cpu"))

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
            heads = configs.clip_config(part("text_encoder"))["num_attention_heads"]
            if heads != CLIP_L_HEADS:
                found.append(f"CLIP has {heads} heads; its weights do not say how many")
        if part("vae").config is None and part("vae").style == "diffusers":
            found.append("the VAE's scale and shift are FLUX.1's; its weights have no config")
        return (*found, *(note for name in self.parts for note in self.notes_of(name)))

    def dtypes(self, dtype: str) -> dict[str, tuple[str, str]]:
        """Keep in float32 what overflows in float16."""
        reasons = dict.fromkeys((c for names in self.stages.values() for c in names), (dtype, ""))
        if dtype == "float16":
            reasons["vae"] = ("float32", "its activations may overflow in float16")
            reasons["text_encoder_2"] = (dtype, "T5's wo in float32: it may overflow in float16")
        return reasons

    def prepare(self, component: str) -> None:
        """Open the tokenizer that belongs to a text encoder."""
        if component == "text_encoder":
            _ = self._clip_tokenizer
        elif component == "text_encoder_2":
            _ = self._t5_tokenizer

    def tensor_dtype(self, component: str, name: str, dtype: torch.dtype) -> torch.dtype:
        """Keep T5's `wo` in float32 where all else is float16."""
        keeps = component == "text_encoder_2" and ".wo." in name and dtype is torch.float16
        return torch.float32 if keeps else dtype

    def encode(self, modules: Modules, request: Resolved) -> tuple[Conditioning, tuple[str, ...]]:
        """Run CLIP for the pooled state and T5 for the sequence; padding is not masked."""
        clip, t5 = modules["text_encoder"], modules["text_encoder_2"]
        device = next(clip.parameters()).device
        clip_ids = tokenizers.encode(
            self._clip_tokenizer,
            [request.prompt],
            padding="max_length",
            max_length=min(CLIP_TOKENS, clip.config.max_position_embeddings),
            truncation=True,
            return_tensors="pt",
        ).input_ids
        check_ids(clip_ids, clip.config.vocab_size, "text_encoder")
        t5_tokens = tokenizers.encode(
            self._t5_tokenizer,
            [request.prompt],
            padding="max_length",
            max_length=request.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        )
        check_ids(t5_tokens.input_ids, t5.config.vocab_size, "text_encoder_2")
        pooled = clip(clip_ids.to(device), output_hidden_states=False).pooler_output
        embeds = t5(t5_tokens.input_ids.to(t5.device), output_hidden_states=False)[0]
        dtype = next(clip.parameters()).dtype
        conditioning = Conditioning(prompt_embeds=embeds.to(dtype), pooled_embeds=pooled.to(dtype))
        used = int(t5_tokens.attention_mask.sum())
        notes = (*self._truncation_note(request, used), *self._vocabulary_note(request))
        return conditioning, notes

    def activations(
        self, request: Resolved, pictures: int, itemsizes: Mapping[str, int]
    ) -> dict[str, int]:
        """Count rows of tokens and of pixels; benchmarks/predicted_peak.py compares with runs."""
        config, text = self.config_of("transformer"), request.max_sequence_length
        width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        pixels = request.height * request.width
        tokens = text + pixels // self.spec.size_multiple**2
        t5 = self.config_of("text_encoder_2")
        channels = int(self.config_of("vae")["block_out_channels"][0])
        return {
            "encode": text * int(t5["d_ff"]) * 4 * itemsizes["text_encoder_2"],
            "denoise": pictures * tokens * width * TOKEN_COPIES * itemsizes["transformer"],
            "decode": pictures * pixels * channels * PIXEL_COPIES * itemsizes["vae"],
        }

    def flops(self, request: Resolved, pictures: int) -> dict[str, float]:
        """Count the products of the blocks and of attention."""
        config, text = self.config_of("transformer"), request.max_sequence_length
        width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        pixels = request.height * request.width
        image = pixels // self.spec.size_multiple**2
        blocks = int(config["num_layers"]) + int(config["num_single_layers"])
        attention = 4 * blocks * width * (text + image) ** 2
        products = 2 * self.block_elements("transformer") * (text + image)
        return {
            "encode": 2 * self.block_elements("text_encoder_2") * text,
            "denoise": pictures * (products + attention),
            "decode": pictures * decode_flops(self.config_of("vae"), pixels),
        }

    def conditioning_size(self, request: Resolved) -> int:
        """Count prompt embeds and pooled embeds."""
        config = self.config_of("transformer")
        tokens = request.max_sequence_length
        return tokens * int(config["joint_attention_dim"]) + int(config["pooled_projection_dim"])

    def draw(self, request: Resolved, seed: int) -> list[torch.Tensor]:
        """Draw (1, 16, height/8, width/8) in float32 on the CPU."""
        height, width = self._latent_size(request)
        return flow.draw(seed, [(1, self._latent_channels, height, width)])

    def denoise(
        self,
        modules: Modules,
        conditioning: Conditioning,
        drawn: Sequence[Sequence[torch.Tensor]],
        request: Resolved,
        on_step: OnStep,
    ) -> torch.Tensor:
        """Integrate the flow from noise to latents with Euler steps.

        Returns:
            (pictures, 16, height/8, width/8).
        """
        transformer = modules["transformer"]
        device, count = transformer.device, len(drawn)
        embeds = conditioning.prompt_embeds.to(device)
        pooled = conditioning.pooled_embeds.to(device)
        latents = sampling.pack(torch.cat([noise for noise, *_ in drawn]).to(embeds.dtype)).to(
            device
        )
        height, width = self._latent_size(request)
        scheduler = self._schedule(request, tokens=latents.shape[1], device=device)
        host = torch.device("cpu")
        text_ids = sampling.text_ids(embeds.shape[1], host)
        image_ids = sampling.image_ids(height // 2, width // 2, host)
        transformer.pos_embed.prepare(torch.cat([text_ids, image_ids]), device)
        constant = {
            "encoder_hidden_states": embeds.repeat(count, 1, 1),
            "pooled_projections": pooled.repeat(count, 1),
            "guidance": self._guidance(request, count, device),
            "txt_ids": text_ids.to(device),
            "img_ids": image_ids.to(device),
            "return_dict": False,
        }
        times = [one.expand(count).to(latents.dtype) / 1000 for one in scheduler.timesteps]
        scales = [scale for scale in (constant["guidance"],) if scale is not None]

        def embed(step: int) -> torch.Tensor:
            seen = [(one.to(latents.dtype) * 1000) for one in (times[step], *scales)]
            embedded: torch.Tensor = transformer.time_text_embed(
                *seen, constant["pooled_projections"]
            )
            return embedded

        # 1. The layers that see only step, guidance and pooled prompt, for all steps.
        with hoisted(
            transformer,
            embed,
            embedder="time_text_embed",
            layers=modulations(transformer),
            steps=len(times),
            kept=self._hoisted,
        ) as at_step:
            # 2. The steps.
            for step, timestep in enumerate(scheduler.timesteps):
                at_step(step)
                velocity = transformer(hidden_states=latents, timestep=times[step], **constant)[0]
                latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                latents = on_step(step + 1, latents, velocity)
        return sampling.unpack(latents, height, width)

    def glimpse(
        self, latents: torch.Tensor, velocity: torch.Tensor, step: int, request: Resolved
    ) -> torch.Tensor:
        """Go from x(sigma) = data + sigma velocity to the data."""
        schedule = self._schedule(request, tokens=latents.shape[1], device=torch.device("cpu"))
        ends = latents - float(schedule.sigmas[step]) * velocity
        return sampling.unpack(ends, *self._latent_size(request))

    def tokens(self, request: Resolved) -> tuple[int, int, int]:
        """Count T5's, to which the prompt is padded, and patches of latents."""
        height, width = self._latent_size(request)
        return request.max_sequence_length, 0, height * width // sampling.PATCH**2

    def decode(self, modules: Modules, latents: torch.Tensor, request: Resolved) -> torch.Tensor:  # noqa: ARG002
        """Undo the latents' scaling and run the VAE's decoder."""
        vae = modules["vae"]
        scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels: torch.Tensor = vae.decode(scaled.to(vae.device, vae.dtype), return_dict=False)[0]
        return pixels

    # --- networks --------------------------------------------------------------------------------

    @cached_property
    def networks(self) -> Mapping[str, Network]:
        """Return how to make the four networks."""
        part = self.checkpoint.component
        return {
            "text_encoder": Network(
                _make_clip, lambda shapes: _clip_rows(part("text_encoder"), shapes), _is_clip_extra
            ),
            "text_encoder_2": Network(
                _make_t5, lambda shapes: _t5_rows(part("text_encoder_2"), shapes), _is_t5_extra
            ),
            "transformer": Network(_make_transformer, self._transformer_rows),
            "vae": Network(_make_vae, self._vae_rows),
        }

    def once(self, component: str, module: torch.nn.Module) -> list[str]:
        """Return the layers that modulate the transformer's blocks."""
        return modulations(module) if component == "transformer" else []

    def read_config(self, component: str) -> Config:
        """Return the config that came with a network, or else what its shapes tell of it."""
        if component == "scheduler":
            return self._read_schedule()
        part = self.checkpoint.component(component)
        if part.config is None:
            return Config(values=configs.DERIVED[component](part))
        given = part.config
        inner = given.get("text_config")
        if component == "text_encoder" and given.get("model_type") == "clip" and inner:
            given = inner if isinstance(inner, dict) else given  # of CLIP, the half that reads
        found = read_config(_KINDS[component], given, name=component, place=part.folder)
        if component == "transformer":
            configs.check_axes(found.values, part.folder)
        return found

    def _read_schedule(self) -> Config:
        if "scheduler" not in self.parts:
            return Config(values=configs.schedule_config(guided=self.spec.kind == "dev"))
        part = self.checkpoint.component("scheduler")
        if part.config is None:
            return Config(values=configs.schedule_config(guided=self.spec.kind == "dev"))
        return read_config(SCHEDULE, part.config, name="scheduler", place=part.folder)

    def counts(self, component: str) -> Mapping[str, Any]:
        """Return how many layers the tensors are of."""
        told = configs.DERIVED[component](self.checkpoint.component(component))
        return {key: told[key] for key in configs.COUNTS[component]}

    def _transformer_rows(self, shapes: Mapping[str, Any]) -> Iterable[Row]:
        part, config = self.checkpoint.component("transformer"), self.config_of("transformer")
        if part.style != "bfl":
            return identity_rows(shapes)
        return keys.transformer_rows(
            double=config["num_layers"],
            single=config["num_single_layers"],
            guided=config["guidance_embeds"],
        )

    def _vae_rows(self, shapes: Mapping[str, Any]) -> Iterable[Row]:
        part, config = self.checkpoint.component("vae"), self.config_of("vae")
        if part.style != "bfl":
            return identity_rows(shapes)
        return keys.vae_rows(
            levels=len(config["block_out_channels"]),
            blocks=config["layers_per_block"],
            shortcuts=configs.shortcuts(shapes, levels=len(config["block_out_channels"])),
        )

    # --- schedule and sizes ----------------------------------------------------------------------

    def _schedule(self, request: Resolved, *, tokens: int, device: torch.device) -> Any:
        """Return a scheduler ready for this request; a fresh one, because it keeps state."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.schedule_config)
        config = scheduler.config
        mu = flow.resolution_shift(
            tokens,
            base_tokens=config.base_image_seq_len,
            max_tokens=config.max_image_seq_len,
            base_shift=config.base_shift,
            max_shift=config.max_shift,
        )
        scheduler.set_timesteps(
            sigmas=sampling.base_sigmas(request.num_inference_steps), mu=mu, device=device
        )
        scheduler.set_begin_index(0)
        return scheduler

    @cached_property
    def schedule_config(self) -> dict[str, Any]:
        """The schedule that came with the weights, or else FLUX.1's."""
        return dict(self.config_of("scheduler"))

    def _guidance(self, request: Resolved, count: int, device: torch.device) -> torch.Tensor | None:
        if "guidance_scale" not in self.spec.takes:
            return None
        return torch.full((count,), request.guidance_scale, dtype=torch.float32, device=device)

    @property
    def _latent_channels(self) -> int:
        return int(self.config_of("transformer")["in_channels"]) // (sampling.PATCH**2)

    def _latent_size(self, request: Resolved) -> tuple[int, int]:
        per_pixel = self.spec.size_multiple // sampling.PATCH
        return request.height // per_pixel, request.width // per_pixel

    # --- text ------------------------------------------------------------------------------------

    @cached_property
    def _clip_tokenizer(self) -> Any:
        return tokenizers.open_tokenizer(tokenizers.CLIP, self.tokenizer_files("tokenizer"))

    @cached_property
    def _t5_tokenizer(self) -> Any:
        return tokenizers.open_tokenizer(tokenizers.T5, self.tokenizer_files("tokenizer_2"))

    def _truncation_note(self, request: Resolved, used: int) -> tuple[str, ...]:
        limit = request.max_sequence_length
        if used < limit:
            return ()
        ids = self._t5_tokenizer(request.prompt, truncation=False, verbose=False).input_ids
        if len(ids) <= limit:
            return ()
        lost = self._t5_tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True)
        if len(lost) > 2 * _SHOWN:
            lost = f"{lost[:_SHOWN]} ... {lost[-_SHOWN:]}"
        return (f"the prompt has {len(ids)} tokens and only {limit} are read; not read: {lost!r}",)

    def _vocabulary_note(self, request: Resolved) -> tuple[str, ...]:
        """Say which words the text encoder cannot read: it was never taught such pieces."""
        unread = [word for word in _words(request.prompt) if not self._can_read(word)]
        if not unread:
            return ()
        known = [piece[1:] for piece in self._t5_tokenizer.get_vocab() if piece[:1] == _WORD_START]
        shown = []
        for word in list(dict.fromkeys(unread))[:_SHOWN_WORDS]:
            near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.75)
            shown.append(f"{word!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        return (f"not in this model's vocabulary: {', '.join(shown)}",)

    def _can_read(self, word: str) -> bool:
        """Say whether a word has pieces of its own, rather than being spelled letter by letter."""
        tokenizer = self._t5_tokenizer
        pieces = tokenizer.tokenize(word)
        if tokenizer.unk_token_id in tokenizer.convert_tokens_to_ids(pieces):
            return False
        if len(tokenizer) >= _READS_LETTERS or not word.isascii():
            return True
        letters = [letter for piece in pieces if (letter := piece.lstrip(_WORD_START))]
        return len(letters) <= _SPELLED or any(len(piece) > 1 for piece in letters)


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", prompt)


def _check_fit(part: Mapping[str, Any]) -> None:
    """See that the networks' widths fit each other: encoders of other models look the same."""
    wanted = part["transformer"]
    rows = (
        ("text_encoder", part["text_encoder"].hidden_size, wanted.pooled_projection_dim),
        ("text_encoder_2", part["text_encoder_2"].d_model, wanted.joint_attention_dim),
        ("vae", part["vae"].latent_channels * sampling.PATCH**2, wanted.in_channels),
    )
    for name, seen, allowed in rows:
        if seen != allowed:
            raise TensorMismatchError(
                f"the {name} is not the one this transformer was trained with",
                seen=f"it gives {seen} channels",
                allowed=f"{allowed}",
                hint=f"name the right one: --component {name}=PLACE",
            )


def _make_clip(config: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    made = CLIPTextConfig.from_dict(dict(config))
    made._attn_implementation = attention_of(CLIPTextModel)  # noqa: SLF001
    return CLIPTextModel(made)


def _make_t5(config: Mapping[str, Any]) -> Any:
    from transformers import T5Config, T5EncoderModel

    made = T5Config.from_dict(dict(config))
    made._attn_implementation = attention_of(T5EncoderModel)  # noqa: SLF001
    return T5EncoderModel(made)


def _make_transformer(config: Mapping[str, Any]) -> Any:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_config(dict(config))
    with without_message(
        "diffusers.models.modeling_utils", "Attention backends are an experimental"
    ):
        transformer.set_attention_backend(ATTENTION_BACKEND)
    transformer.pos_embed = Positions(transformer.pos_embed)
    return transformer


def _make_vae(config: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(dict(config))


def _clip_rows(component: Component, shapes: Mapping[str, Any]) -> list[Row]:
    """Match names with or without `text_model.`: transformers dropped the prefix in 5.6."""
    prefix = "text_model."
    prefixed = any(name.startswith(prefix) for name in component.entries)
    rows = []
    for name in shapes:
        bare = name.removeprefix(prefix)
        rows.append(Row(prefix + bare if prefixed else bare, (name,)))
    return rows


def _t5_rows(component: Component, shapes: Mapping[str, Any]) -> list[Row]:
    """Match names; files keep the tied embedding under one name, the other, or both."""
    if component.style == "llama.cpp":
        return [Row(keys.llama_name(name), (name,)) for name in shapes]
    held = next((name for name in _T5_TIED if name in component.entries), _T5_TIED[0])
    return [Row(held if name in _T5_TIED else name, (name,)) for name in shapes]


def _is_clip_extra(name: str) -> bool:
    return name.startswith(_CLIP_EXTRAS) or name.endswith("position_ids")


def _is_t5_extra(name: str) -> bool:
    return name.startswith(_T5_EXTRAS) or name in _T5_TIED
