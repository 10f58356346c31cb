"""DeepGen-1.0 put together from stock parts of transformers and diffusers, without danqing.

The batch is padded and masked as the original does it; the connector's layers are SigLIP's, which
have the same form; the transformer is stock SD3 with its patch embedding and last norm wrapped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

T2I = "<|im_start|>user\nGenerate an image: {}<|im_end|>\n<|im_start|>assistant\n"
EDIT = "<|im_start|>user\n{}\n{}<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Parts:
    """Stock networks and the connector's loose tensors."""

    vlm: Any
    transformer: Any
    vae: Any
    scheduler: Any
    tokenizer: Any
    connector: dict[str, torch.Tensor]
    encoder: Any
    heads: int


def load(
    folder: Path, dtype: torch.dtype = torch.float32, connector: Mapping[str, Any] | None = None
) -> Parts:
    """Open a folder with the libraries' own loaders; `connector` is its config, if it has none."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoder

    state = load_file(folder / "connector" / "model.safetensors")
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    config = connector or json.loads((folder / "connector" / "config.json").read_text())
    siglip = SiglipVisionConfig(
        hidden_size=config["hidden_size"], intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"], layer_norm_eps=1e-6,
        num_attention_heads=config["num_attention_heads"], hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    siglip._attn_implementation = "eager"
    encoder = SiglipEncoder(siglip).to(dtype).eval()
    prefix = "connector."
    encoder.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    options = {"torch_dtype": dtype, "local_files_only": True}
    return Parts(
        vlm=Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "vlm", attn_implementation="sdpa", **options
        ).eval(),
        transformer=SD3Transformer2DModel.from_pretrained(folder / "transformer", **options),
        vae=AutoencoderKL.from_pretrained(folder / "vae", **options),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        connector=state,
        encoder=encoder,
        heads=config["num_attention_heads"],
    )  # fmt: skip


def pixels_of(image: Image, height: int, width: int) -> torch.Tensor:
    """Return (1, 3, height, width), -1 to 1."""
    resized = np.asarray(image.resize((width, height)), np.float32)  # bicubic is the default
    return torch.from_numpy(resized / 255 * 2 - 1).permute(2, 0, 1)[None]


def patches_of(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what Qwen's own image processor makes of the smaller picture, and its grid."""
    from transformers import Qwen2VLImageProcessor

    small = F.interpolate(pixels, scale_factor=28 / 32, mode="bilinear", align_corners=False)
    processor = Qwen2VLImageProcessor(
        do_resize=False, do_rescale=False, do_convert_rgb=False,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
        patch_size=14, temporal_patch_size=2, merge_size=2,
    )  # fmt: skip
    found = processor(
        images=((small[0] + 1) / 2).permute(1, 2, 0).numpy(), return_tensors="pt",
        input_data_format="channels_last",
    )  # fmt: skip
    return found["pixel_values"], found["image_grid_thw"]


@torch.no_grad()
def encode(
    parts: Parts, prompts: Sequence[str], pictures: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return sequence, pooled and all hidden states of prompts that are padded together."""
    model = parts.vlm.model
    features, grids = [], []
    for picture in pictures:
        patches, grid = patches_of(picture)
        seen = model.visual(patches, grid_thw=grid)
        features.append(seen if isinstance(seen, torch.Tensor) else seen.pooler_output)
        grids.append(grid)
    counts = [len(feature) for feature in features]
    texts = [row(prompt, counts) for prompt in prompts]
    tokens = parts.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    ids, mask = tokens.input_ids, tokens.attention_mask
    queries = parts.connector["meta_queries"]
    embeds = model.language_model.embed_tokens(ids)
    if features:
        image = parts.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        embeds[ids == image] = torch.cat(features * len(prompts))
    embeds = torch.cat([embeds, queries.expand(len(prompts), -1, -1)], dim=1)
    more = torch.zeros(len(prompts), len(queries), dtype=ids.dtype)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, more + 1], 1)
    all_grids = torch.cat(grids * len(prompts)) if grids else None
    position_ids = positions(parts, ids, mask, all_grids)
    states = hidden_states(model.language_model, embeds, mask, position_ids)
    stacked = torch.cat([states[depth] for depth in (35, 29, 23, 17, 11, 5)], dim=-1)
    get = parts.connector.__getitem__
    mixed = F.linear(stacked, get("projector_1.weight"), get("projector_1.bias"))
    mixed = parts.encoder(inputs_embeds=mixed).last_hidden_state
    pooled = F.linear(mixed.mean(1), get("projector_2.weight"), get("projector_2.bias"))
    sequence = F.linear(mixed, get("projector_3.weight"), get("projector_3.bias"))
    return sequence, pooled, states


def row(prompt: str, counts: Sequence[int]) -> str:
    """Return the text of one row."""
    images = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in counts)
    return EDIT.format(images, prompt) if counts else T2I.format(prompt)


def positions(parts: Parts, ids: Any, mask: Any, grid: Any) -> Any:
    """Return what the library computes for rows with pictures, and the rule for those without."""
    if grid is None:
        counted = mask.cumsum(-1) - 1
        return counted.masked_fill(mask == 0, 1).expand(3, -1, -1)
    model = parts.vlm.model
    image = parts.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    try:
        found, _ = model.get_rope_index(ids, image_grid_thw=grid, attention_mask=mask)
    except TypeError:  # transformers 5
        kinds = (ids == image).int()
        found, _ = model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=mask
        )
    return found


def hidden_states(text: Any, embeds: Any, mask: Any, position_ids: Any) -> tuple[torch.Tensor, ...]:
    """Return the library's own list: the embeddings, then the output of each layer."""
    out = text(
        inputs_embeds=embeds, attention_mask=mask.bool(), position_ids=position_ids,
        use_cache=False, output_hidden_states=True,
    )  # fmt: skip
    return tuple(out.hidden_states)


def transform(
    parts: Parts, latents: torch.Tensor, references: Sequence[torch.Tensor], sequence: Any,
    pooled: Any, timestep: Any,
) -> torch.Tensor:  # fmt: skip
    """Run stock SD3 with more tokens behind the picture's own, and only the first kept."""
    transformer = parts.transformer
    embed, norm = transformer.pos_embed.forward, transformer.norm_out.forward
    own = latents.shape[-1] * latents.shape[-2] // 4

    def longer(latent: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [embed(latent), *(embed(one.expand(len(latent), -1, -1, -1)) for one in references)], 1
        )

    def shorter(states: torch.Tensor, *rest: Any) -> torch.Tensor:
        out: torch.Tensor = norm(states[:, :own], *rest)
        return out

    transformer.pos_embed.forward, transformer.norm_out.forward = longer, shorter
    try:
        out: torch.Tensor = transformer(
            hidden_states=latents, encoder_hidden_states=sequence, pooled_projections=pooled,
            timestep=timestep, return_dict=False,
        )[0]  # fmt: skip
    finally:
        del transformer.pos_embed.forward, transformer.norm_out.forward
    return out


@torch.no_grad()
def paint(
    parts: Parts, prompt: str, negative: str, noise: torch.Tensor, *, steps: int, guidance: float,
    pictures: Sequence[torch.Tensor] = (), draws: Sequence[torch.Tensor] = (),
) -> torch.Tensor:  # fmt: skip
    """Return pixels (1, 3, height, width), nominally -1 to 1."""
    sequence, pooled, _ = encode(parts, [prompt, negative], pictures)
    config = parts.vae.config
    references = []
    for picture, draw in zip(pictures, draws, strict=True):
        posterior = parts.vae.encode(picture).latent_dist
        sample = posterior.mean + posterior.std * draw
        references.append((sample - config.shift_factor) * config.scaling_factor)
    parts.scheduler.set_timesteps(steps)
    latents = noise
    for timestep in parts.scheduler.timesteps:
        both = transform(
            parts, torch.cat([latents, latents]), references, sequence[[1, 0]], pooled[[1, 0]],
            timestep.expand(2),
        )  # fmt: skip
        away, towards = both.chunk(2)
        velocity = away + guidance * (towards - away)
        latents = parts.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    pixels: torch.Tensor = parts.vae.decode(
        latents / config.scaling_factor + config.shift_factor, return_dict=False
    )[0]
    return pixels
