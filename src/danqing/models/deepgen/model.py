"""DeepGen-1.0 as three stages, over the networks of transformers and diffusers and a connector."""

from __future__ import annotations

import inspect
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from danqing.errors import (
    CheckpointError,
    CheckpointIncompleteError,
    RequestError,
    TensorMismatchError,
)
from danqing.models import config_tables, flow, tokenizers
from danqing.models.config_tables import CONNECTOR, Config, read_config
from danqing.models.deepgen import SLOTS, configs, fitted_size, language, prompts
from danqing.models.deepgen.connector import Connector
from danqing.models.deepgen.transformer import predict
from danqing.models.flux import configs as flux_configs
from danqing.models.networks import (
    Network,
    NetworksModel,
    check_ids,
    decode_flops,
)
from danqing.networks.hoisting import hoisted, modulations
from danqing.networks.kernels import choose_by_tensor
from danqing.networks.loading import Row, identity_rows
from danqing.request import Request
from danqing.weights.deepgen_pt import LAYOUT as DEEPGEN_PT
from danqing.weights.json_file import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from danqing.models.base import Modules, OnStep
    from danqing.models.slots import Slot
    from danqing.references import Reference
    from danqing.request import Resolved
    from danqing.weights import Component

PAD = "<|endoftext|>"
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False,
}  # fmt: skip
"""Of SD3.5-medium, for weights that came without one."""
DYNAMIC = {"base_tokens": 256, "max_tokens": 4096, "base_shift": 0.5, "max_shift": 1.16}
"""What the shift by resolution is computed from, where a schedule wants one."""
TOKEN_COPIES = 24
"""Numbers a block holds for each token and channel at its worst."""
PIXEL_COPIES = 8
"""Numbers the decoder holds for each pixel and channel of its last level."""
_KINDS = {
    "vlm": config_tables.QWEN_VL,
    "transformer": config_tables.SD3_TRANSFORMER,
    "vae": config_tables.AUTOENCODER,
}
_ONE_STEP = Request(prompt="a", num_inference_steps=1, height=32, width=32)


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What prompt, negative prompt and pictures became; row 0 is the prompt's.

    Attributes:
        context: (rows, tokens, joint width); the second row, if there is guidance, the negative's.
        pooled: (rows, pooled width).
        means: of each picture's encoding, (1, channels, height/8, width/8).
        deviations: of the same.
    """

    context: torch.Tensor
    pooled: torch.Tensor
    means: tuple[torch.Tensor, ...]
    deviations: tuple[torch.Tensor, ...]


class DeepGenModel(NetworksModel):
    """A DeepGen of any size."""

    slots: ClassVar[tuple[Slot, ...]] = SLOTS
    tokenizer_kinds: ClassVar[Mapping[str, tokenizers.TokenizerKind]] = {
        "tokenizer": tokenizers.QWEN2
    }
    conditioning: ClassVar[type] = Conditioning
    encode_reads: ClassVar[tuple[str, ...]] = (
        "prompt", "negative_prompt", "image", "resize", "height", "width", "guidance_scale",
    )  # fmt: skip

    # --- checks ----------------------------------------------------------------------------------

    def check_part(self, name: str) -> None:
        """Compare a part with its files; the prompt template belongs to the tokenizer."""
        if name == "vlm":
            self._check_vlm()
        super().check_part(name)
        if name == "tokenizer":
            _ = self.template

    def check_together(self) -> None:
        """Compare the networks' widths with each other, and the tokenizer with its reader."""
        part: dict[str, Any] = {name: module.config for name, module in self._checked.items()}
        text, wanted = part["vlm"].text_config, part["transformer"]
        self.check_vocabulary("tokenizer", "vlm", text.vocab_size)
        stacked = len(language.depths(text.num_hidden_layers)) * text.hidden_size
        connector = part["connector"]
        rows = (
            ("vlm", "states", text.hidden_size, connector["query_size"]),
            ("vlm", "stacked states", stacked, connector["input_size"]),
            (
                "connector", "pooled", connector["pooled_projection_dim"],
                wanted.pooled_projection_dim,
            ),
            ("connector", "context", connector["joint_attention_dim"], wanted.joint_attention_dim),
            ("vae", "latent", part["vae"].latent_channels, wanted.in_channels),
        )  # fmt: skip
        for name, what, seen, allowed in rows:
            if seen != allowed:
                raise TensorMismatchError(
                    f"the {name} is not the one that belongs to the others",
                    seen=f"it gives {seen} {what} channels",
                    allowed=f"{allowed}",
                    hint=f"name the right one: --component {name}=PLACE",
                )

    def _check_vlm(self) -> None:
        if "vlm" not in self.checkpoint.components:
            if "vlm" in self.checkpoint.broken:
                raise self.checkpoint.broken["vlm"]
            raise CheckpointIncompleteError(
                "the checkpoint has no vlm",
                seen=f"{self.checkpoint.path}: {', '.join(self.checkpoint.components)}",
                hint="DeepGen's language model is fine-tuned: stock Qwen2.5-VL does not replace "
                "it. Releases before March 2026 lack the folder vlm/: get the newer one",
            )
        vlm = self.checkpoint.component("vlm")
        if configs.looks_stock(vlm):
            raise CheckpointError(
                "the vlm is stock Qwen2.5-VL, and DeepGen's is fine-tuned: with the stock one it "
                "paints other pictures",
                seen=f"{vlm.folder}: saved by transformers {vlm.config['transformers_version']}"
                if vlm.config
                else vlm.folder,
                allowed="the vlm of DeepGen-1.0-diffusers, or stock with a .pt that holds adapters",
                hint="get the folder vlm/ of the release of March 2026 or later",
            )

    def try_schedule(self) -> None:
        """Make a schedule of one step."""
        self._schedule(self.spec.resolve(_ONE_STEP), torch.device("cpu"))

    def assumptions(self) -> tuple[str, ...]:
        """Say what the files left open."""
        found = []
        if "scheduler" not in self.checkpoint.components:
            found.append("the schedule is SD3.5-medium's (shift 3); the weights have no config")
        if self.checkpoint.component("connector").config is None:
            heads = self.config_of("connector")["num_attention_heads"]
            found.append(f"the connector has {heads} heads of 64; it came without a config")
        vlm = self.checkpoint.component("vlm")
        if vlm.adapters:
            found.append(
                f"{len(vlm.adapters)} adapters of the .pt are merged into {vlm.folder}, taken for "
                "stock Qwen2.5-VL"
            )
        elif self.checkpoint.layout == DEEPGEN_PT:
            found.append(f"the .pt holds no adapters: {vlm.folder} is taken for a merged vlm")
        if self.checkpoint.component("transformer").config is None:
            found.append("the transformer's config is read off its shapes; the .pt has none")
        if not os.path.lexists(self._template_file):
            found.append("the prompt template is the released one; the weights have none")
        return (*found, *(note for name in self.parts for note in self.notes_of(name)))

    def dtypes(self, dtype: str) -> dict[str, tuple[str, str]]:
        """Keep in float32 what overflows in float16."""
        reasons = {slot.name: (dtype, "") for slot in SLOTS if slot.stage}
        if dtype == "float16":
            reasons["vae"] = ("float32", "its activations may overflow in float16")
        return reasons

    # --- networks --------------------------------------------------------------------------------

    @cached_property
    def networks(self) -> Mapping[str, Network]:
        """Return how to make the four networks."""
        part = self.checkpoint.component
        return {
            "vlm": Network(_make_vlm, lambda shapes: _vlm_rows(part("vlm"), shapes), _is_vlm_extra),
            "connector": Network(
                Connector, lambda shapes: _connector_rows(part("connector"), shapes)
            ),
            "transformer": Network(_make_transformer, identity_rows),
            "vae": Network(_make_vae, identity_rows),
        }

    def read_config(self, component: str) -> Config:
        """Return the config that came with a network; what is not needed is read off its shapes."""
        if component == "scheduler":
            return self._read_schedule()
        part = self.checkpoint.component(component)
        if component == "connector":
            given = read_config(CONNECTOR, part.config or {}, name=component, place=part.folder)
            return replace(given, values=configs.connector_config(part, given.values))
        if component == "transformer" and part.config is None:
            return Config(values=configs.transformer_config(part))
        if part.config is None:
            raise CheckpointIncompleteError(
                f"the {component} came without a config",
                seen=part.files[0] if part.files else part.folder,
                allowed="a config.json beside it",
            )
        found = read_config(_KINDS[component], part.config, name=component, place=part.folder)
        if component == "vlm":
            configs.check_heads(found.values, part.folder)
        return found

    def _read_schedule(self) -> Config:
        if "scheduler" not in self.parts:
            return Config(values=dict(SCHEDULE))
        part = self.checkpoint.component("scheduler")
        if part.config is None:
            return Config(values=dict(SCHEDULE))
        return read_config(config_tables.SCHEDULE, part.config, name="scheduler", place=part.folder)

    def counts(self, component: str) -> Mapping[str, Any]:
        """Return how many layers the tensors are of."""
        part = self.checkpoint.component(component)
        if component == "vlm":
            return configs.vlm_counts(part, self.config_of("vlm"), _VLM_STYLES)
        if component == "vae":
            told = flux_configs.vae_config(part)
            return {key: told[key] for key in flux_configs.COUNTS["vae"]}
        if component == "transformer":
            told = configs.transformer_config(part)
            return {key: told[key] for key in configs.TRANSFORMER_COUNTS}
        return {}  # the connector's config is read off its shapes as it is

    def trimmed(self, component: str, module: torch.nn.Module) -> torch.nn.Module:
        """Drop the last layer of the language model and its norm: nothing depends on them."""
        if component == "vlm":
            language.trim(module)
        return module

    def once(self, component: str, module: torch.nn.Module) -> list[str]:
        """Return the layers that modulate the transformer's blocks."""
        return modulations(module) if component == "transformer" else []

    def prepare(self, component: str) -> None:
        """Open the tokenizer that belongs to the language model."""
        if component == "vlm":
            _ = self._tokenizer

    def finish(self, component: str, module: Any) -> None:
        """Multiply patches instead of convolving them; let layers look where their input is."""
        if component == "vlm":
            module.visual.patch_embed.proj = language.PatchLinear(module.visual.patch_embed.proj)
        choose_by_tensor(module)

    # --- stages ----------------------------------------------------------------------------------

    def encode(self, modules: Modules, request: Resolved) -> tuple[Conditioning, tuple[str, ...]]:
        """Read prompt, negative prompt and pictures once; rows are padded to the longest.

        Padding is part of the result, as in the original: the connector and the transformer attend
        to it, so the negative prompt's length counts even where there is no guidance.
        """
        vlm, connector = modules["vlm"], modules["connector"]
        weight = connector.projector_1.weight
        pictures = [self._pixels(image, request) for image in request.image]
        seen = [language.see(vlm, picture.to(weight.dtype)) for picture in pictures]
        features, grids = [one for one, _ in seen], [grid for _, grid in seen]
        counts = [rows * columns for rows, columns in grids]
        texts = [request.prompt, request.negative_prompt]
        rows = [self._row(text, counts) for text in texts]
        width = max(len(ids) for ids in rows) + len(connector.meta_queries)
        check_ids(torch.cat(rows), vlm.language_model.embed_tokens.num_embeddings, "vlm")
        image_token = self._image_token if counts else -1
        queries = connector.meta_queries.to(vlm.device)
        read = []
        for ids in rows if _is_guided(request) else rows[:1]:
            embeds = language.embed(vlm, ids, image_token, features, queries)
            places = prompts.positions(ids, image_token, grids, len(connector.meta_queries))
            read.append(language.states(vlm, embeds, places))
        padding = None
        if any(states.shape[1] < width for states in read):
            padding = language.padding_states(vlm, self._pad_token)
        stacked = torch.cat([language.padded(states, width, padding) for states in read])
        pooled, context = connector(stacked.to(weight.device))
        encoded = [_posterior(modules["vae"], picture) for picture in pictures]
        conditioning = Conditioning(
            context=context,
            pooled=pooled,
            means=tuple(mean for mean, _ in encoded),
            deviations=tuple(deviation for _, deviation in encoded),
        )
        return conditioning, ()

    def activations(
        self, request: Resolved, pictures: int, itemsizes: Mapping[str, int]
    ) -> dict[str, int]:
        """Count rows of tokens and of pixels; benchmarks/predicted_peak.py compares with runs."""
        config = self.config_of("transformer")
        width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        pixels = request.height * request.width
        told = [fitted_size(image, request) for image in request.image]
        seen = max((height * width for height, width in told), default=0)
        text, tokens = self._tokens(request)
        vlm = self.config_of("vlm")
        inner = int((vlm.get("text_config") or vlm)["intermediate_size"])
        channels = int(self.config_of("vae")["block_out_channels"][0])
        rows = pictures * (2 if _is_guided(request) else 1)
        return {
            "encode": max(
                text * inner * 6 * itemsizes["vlm"],
                seen * channels * PIXEL_COPIES * itemsizes["vae"],
            ),
            "denoise": rows * tokens * width * TOKEN_COPIES * itemsizes["transformer"],
            "decode": pictures * pixels * channels * PIXEL_COPIES * itemsizes["vae"],
        }

    def flops(self, request: Resolved, pictures: int) -> dict[str, float]:
        """Count the products of the blocks and of attention."""
        config = self.config_of("transformer")
        width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        pixels = request.height * request.width
        text, tokens = self._tokens(request)
        rows = pictures * (2 if _is_guided(request) else 1)
        attention = 4 * int(config["num_layers"]) * width * tokens**2
        # a block has weights of its own for words and for pictures, about as many
        products = self.block_elements("transformer") * tokens
        return {
            "encode": 2 * self.block_elements("vlm") * text,
            "denoise": rows * (products + attention),
            "decode": pictures * decode_flops(self.config_of("vae"), pixels),
        }

    def _tokens(self, request: Resolved) -> tuple[int, int]:
        """Return the tokens of the longer prompt, and those of prompt and pictures together."""
        sizes = [fitted_size(image, request) for image in request.image]
        counts = [language.tokens_of(*one) for one in sizes]
        texts = [request.prompt, request.negative_prompt]
        text = max(len(self._row(words, counts)) for words in texts)
        text += int(self.config_of("connector")["num_queries"])
        sizes.append((request.height, request.width))
        return text, text + sum(self._patches(*size) for size in sizes)

    def _patches(self, height: int, width: int) -> int:
        """Return the transformer's tokens of a picture, its sides in pixels."""
        levels = len(self.config_of("vae")["block_out_channels"])
        patch = int(self.config_of("transformer")["patch_size"]) << (levels - 1)
        return height * width // patch**2

    def conditioning_size(self, request: Resolved) -> int:
        """Count context and pooled vectors of both prompts, and the encodings of the pictures."""
        config = self.config_of("connector")
        sizes = [fitted_size(image, request) for image in request.image]
        tokens, _ = self._tokens(request)
        row = tokens * int(config["joint_attention_dim"]) + int(config["pooled_projection_dim"])
        latents = sum(math.prod(self._latent_shape(*one)) for one in sizes)
        return row * (2 if _is_guided(request) else 1) + 2 * latents

    def draw(self, request: Resolved, seed: int) -> list[torch.Tensor]:
        """Draw (1, channels, height/8, width/8), then the same of each picture to edit.

        The original samples the encodings of the pictures to edit from the global generator, so
        that its edits differ from run to run; here they come from the seed too.
        """
        sizes = [(request.height, request.width)]
        if request.reference_latent == "sample":
            sizes += [fitted_size(image, request) for image in request.image]
        return flow.draw(seed, [self._latent_shape(*size) for size in sizes])

    def denoise(
        self,
        modules: Modules,
        conditioning: Conditioning,
        drawn: Sequence[Sequence[torch.Tensor]],
        request: Resolved,
        on_step: OnStep,
    ) -> torch.Tensor:
        """Integrate the flow with Euler steps, guided away from the negative prompt.

        Returns:
            (pictures, channels, height/8, width/8).
        """
        transformer, count = modules["transformer"], len(drawn)
        device = transformer.device
        context, pooled = conditioning.context.to(device), conditioning.pooled.to(device)
        latents = torch.cat([noise for noise, *_ in drawn]).to(device, context.dtype)
        told = [
            [one.to(device) for one in self._reference_latents(conditioning, draws)]
            for _, *draws in drawn
        ]
        scheduler = self._schedule(request, device)
        # the negative prompt's rows come first, as in the original
        order = [row for row in (1, 0) if row < len(context)]
        rows = [row for row in order for _ in range(count)]
        guidance = request.guidance_scale
        times = [timestep.float().expand(len(rows)) for timestep in scheduler.timesteps]
        pooled_rows = pooled[torch.tensor(rows, device=device)]
        # 1. The layers that see only step and pooled prompt, for all steps.
        with hoisted(
            transformer,
            lambda step: transformer.time_text_embed(times[step], pooled_rows),
            embedder="time_text_embed",
            layers=modulations(transformer),
            steps=len(times),
            kept=self._hoisted,
        ) as at_step:
            # 2. The steps.
            for step, timestep in enumerate(scheduler.timesteps):
                at_step(step)
                velocity = torch.stack(
                    predict(
                        transformer,
                        [*latents] * len(order),
                        told * len(order),
                        [context[row] for row in rows],
                        pooled_rows,
                        times[step],
                    )
                )
                if len(order) > 1:
                    away, towards = velocity.chunk(2)
                    velocity = away + guidance * (towards - away)
                latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                latents = on_step(step + 1, latents, velocity)
        return latents

    def glimpse(
        self, latents: torch.Tensor, velocity: torch.Tensor, step: int, request: Resolved
    ) -> torch.Tensor:
        """Go from x(sigma) = data + sigma velocity to the data."""
        schedule = self._schedule(request, torch.device("cpu"))
        return latents - float(schedule.sigmas[step]) * velocity

    def tokens(self, request: Resolved) -> tuple[int, int, int]:
        """Count those that the language model reads and learns, and patches of latents."""
        text, with_pictures = self._tokens(request)
        painted = self._patches(request.height, request.width)
        return text, with_pictures - text - painted, painted

    def decode(self, modules: Modules, latents: torch.Tensor, request: Resolved) -> torch.Tensor:  # noqa: ARG002
        """Undo the latents' scaling and run the autoencoder's decoder."""
        vae = modules["vae"]
        scale, shift = self._factors
        pixels: torch.Tensor = vae.decode(
            (latents / scale + shift).to(vae.device, vae.dtype), return_dict=False
        )[0]
        return pixels

    # --- pictures to edit ------------------------------------------------------------------------

    def _pixels(self, image: Reference, request: Resolved) -> torch.Tensor:
        """Return a picture in its working size: (1, 3, height, width), float32, -1 to 1."""
        from PIL import Image

        height, width = fitted_size(image, request)
        resized = image.image.resize((width, height), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]
        return values.float() / 255 * 2 - 1

    def _reference_latents(
        self, conditioning: Conditioning, draws: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return the latents of each picture to edit, (channels, height/8, width/8).

        They are samples of its encoding where there are draws, and its mode where there are none.
        """
        scale, shift = self._factors
        latents = list(conditioning.means)
        for place, draw in enumerate(draws):
            mean, deviation = latents[place], conditioning.deviations[place]
            latents[place] = mean + deviation * draw.to(mean.device, mean.dtype)
        return [((one - shift) * scale).to(conditioning.context.dtype)[0] for one in latents]

    @cached_property
    def _factors(self) -> tuple[float, float]:
        config = self.config_of("vae")
        return float(config.get("scaling_factor", 1.0)), float(config.get("shift_factor") or 0.0)

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape of the latents of a picture of this size."""
        channels = int(self.config_of("transformer")["in_channels"])
        per_pixel = 2 ** (len(self.config_of("vae")["block_out_channels"]) - 1)
        return 1, channels, height // per_pixel, width // per_pixel

    # --- schedule --------------------------------------------------------------------------------

    def _schedule(self, request: Resolved, device: torch.device) -> Any:
        """Return a scheduler ready for this request; a fresh one, because it keeps state."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.schedule_config)
        extra = {}
        if scheduler.config.use_dynamic_shifting:
            _, _, height, width = self._latent_shape(request.height, request.width)
            extra["mu"] = flow.resolution_shift(height * width // 4, **DYNAMIC)  # type: ignore[arg-type]
        scheduler.set_timesteps(request.num_inference_steps, device=device, **extra)
        scheduler.set_begin_index(0)
        return scheduler

    @cached_property
    def schedule_config(self) -> dict[str, Any]:
        """The schedule that came with the weights, or else SD3.5-medium's."""
        return dict(self.config_of("scheduler"))

    # --- text ------------------------------------------------------------------------------------

    @cached_property
    def template(self) -> prompts.Template:
        """The words around a prompt: those that came with the weights, or the released ones."""
        place = self._template_file
        return prompts.template_from(read_json(place) if os.path.lexists(place) else {}, place)

    @property
    def _template_file(self) -> Any:
        path = self.checkpoint.path
        return (path if path.is_dir() else path.parent) / "prompt_template.json"

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizers.open_tokenizer(tokenizers.QWEN2, self.tokenizer_files("tokenizer"))

    def _row(self, text: str, counts: Sequence[int]) -> torch.Tensor:
        """Return the tokens of a prompt in its template.

        Raises:
            RequestError: the prompt itself holds the word that stands for a picture.
        """
        ids = self._ids(self.template.row(text, counts))
        if counts and int((ids == self._image_token).sum()) != sum(counts):
            raise RequestError(
                "the prompt holds the word that stands for a picture",
                seen=self.template.image_token,
                hint="leave it out: the pictures are put before the prompt",
            )
        return ids

    def _ids(self, text: str) -> torch.Tensor:
        encoded = tokenizers.encode(self._tokenizer, text, return_tensors="pt")
        ids: torch.Tensor = encoded.input_ids[0]
        return ids

    @cached_property
    def _image_token(self) -> int:
        return self._single_token(self.template.image_token)

    @cached_property
    def _pad_token(self) -> int:
        return self._single_token(PAD)

    def _single_token(self, text: str) -> int:
        ids = self._ids(text)
        if len(ids) != 1:
            raise TensorMismatchError(
                "the tokenizer is of another model",
                seen=f"{text} is {len(ids)} tokens",
                allowed="the tokenizer of Qwen2.5-VL",
            )
        return int(ids[0])


def _is_guided(request: Resolved) -> bool:
    return request.guidance_scale > 1


def _posterior(vae: Any, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of a picture's encoding."""
    found = vae.encode(picture.to(vae.device, vae.dtype)).latent_dist
    return found.mean, found.std


# --- networks ------------------------------------------------------------------------------------


def _make_vlm(config: Mapping[str, Any]) -> Any:
    from transformers import AutoModel, Qwen2_5_VLConfig

    whole = Qwen2_5_VLConfig.from_dict(dict(config))
    model = AutoModel.from_config(whole, attn_implementation="sdpa")
    for part in (model.language_model, model.visual):
        _remake_rotary(part)
    return model


def _remake_rotary(network: Any) -> None:
    """Make the tables of rotary positions off the meta device: no file holds them."""
    made: dict[type, Any] = {}
    for name, module in list(network.named_modules()):
        kind = type(module)
        if "inv_freq" not in dict(module.named_buffers(recurse=False)):
            continue
        if kind not in made:
            takes_config = "config" in inspect.signature(kind).parameters  # the tower's not in 4.57
            head = network.config.hidden_size // getattr(network.config, "num_heads", 1)
            with torch.device("cpu"):
                made[kind] = kind(network.config) if takes_config else kind(head // 2)
        holder, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(holder), leaf, made[kind])


def _make_transformer(config: Mapping[str, Any]) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_config(dict(config))


def _make_vae(config: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(dict(config))


_VLM_STYLES: tuple[tuple[str, Mapping[str, str]], ...] = (
    (
        "model.language_model.",
        {"language_model.": "model.language_model.", "visual.": "model.visual."},
    ),
    ("language_model.", {}),
    ("model.", {"language_model.": "model.", "visual.": "visual."}),
)
"""How names of the language model's tensors begin on disk, and what ours begin with there:
transformers from 4.52 on, without the outer name, and before 4.52."""


def _vlm_rows(component: Component, shapes: Mapping[str, Any]) -> list[Row]:
    for start, renamed in _VLM_STYLES:
        if any(name.startswith(start) for name in component.entries):
            return [Row(_renamed(name, renamed), (name,)) for name in shapes]
    return identity_rows(shapes)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _is_vlm_extra(name: str) -> bool:
    return name == "lm_head.weight"  # tied to the embeddings, and not needed


def _connector_rows(component: Component, shapes: Mapping[str, Any]) -> list[Row]:
    prefix = configs.layers_prefix(component)
    return [
        Row(prefix + name.removeprefix("layers.") if name.startswith("layers.") else name, (name,))
        for name in shapes
    ]
