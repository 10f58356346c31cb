"""A toy SD3.5-medium: the real architecture, small widths, random weights.

Written by `StableDiffusion3Pipeline.save_pretrained`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from tests import toys

CLIP_L = {**toys.CLIP, "projection_dim": 24}
CLIP_G = {
    **toys.CLIP, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 6, "projection_dim": 40, "hidden_act": "gelu",
}  # fmt: skip
T5 = {**toys.T5, "d_model": 96}
TRANSFORMER = {
    "sample_size": 16, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3,
    "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 96,
    "caption_projection_dim": 64, "pooled_projection_dim": 64, "pos_embed_max_size": 24,
    "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
}  # fmt: skip
VAE = {**toys.VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
RELEASED: dict[str, dict[str, Any]] = {
    "text_encoder": {
        **toys.CLIP, "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    },
    "text_encoder_2": {
        **toys.CLIP, "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120,
        "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280,
        "hidden_act": "gelu", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    },
    "text_encoder_3": {
        **toys.T5, "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240,
        "num_layers": 24, "num_heads": 64,
    },
    "transformer": {
        **TRANSFORMER, "sample_size": 128, "num_layers": 24, "attention_head_dim": 64,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    "vae": {
        **VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
        "sample_size": 1024,
    },
}  # fmt: skip
"""Configs of stabilityai/stable-diffusion-3.5-medium, as published."""


TOY = {
    "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5,
    "transformer": TRANSFORMER, "vae": VAE,
}  # fmt: skip


def make_network(name: str, config: dict[str, Any]) -> Any:
    """Return one of the networks as diffusers or transformers has it."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if name == "text_encoder_3":
        return T5EncoderModel(T5Config(**config))
    if name.startswith("text_encoder"):
        return CLIPTextModelWithProjection(CLIPTextConfig(**config))
    return (SD3Transformer2DModel if name == "transformer" else AutoencoderKL)(**config)


def make_networks(seed: int = 3) -> dict[str, Any]:
    """Return the networks of a toy with random float32 weights, by diffusers' component names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {name: make_network(name, config) for name, config in TOY.items()}
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            for parameter in networks[name].parameters():
                if parameter.ndim > 1:  # their own initialisation is nearly blind to the prompt
                    torch.nn.init.normal_(parameter, std=0.3)
    return {name: network.eval() for name, network in networks.items()}


def write(folder: Path, *, seed: int = 3) -> Path:
    """Write a toy with diffusers' own pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer, T5TokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    padding = {"pad_token": "!"}  # as the released tokenizer of CLIP-G
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        toys.write_clip_tokenizer(home / "clip")
        toys.write_t5_tokenizer(home / "t5")
        pipe = StableDiffusion3Pipeline(
            **make_networks(seed),
            tokenizer=CLIPTokenizer.from_pretrained(home / "clip", local_files_only=True),
            tokenizer_2=CLIPTokenizer.from_pretrained(
                home / "clip", local_files_only=True, **padding
            ),
            tokenizer_3=T5TokenizerFast.from_pretrained(home / "t5", local_files_only=True),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        pipe.save_pretrained(folder)
    return folder


def open_with_diffusers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Open a folder with diffusers' own pipeline, its weights where MKL is repeatable."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        for parameter in getattr(pipe, name).parameters():
            parameter.data = parameter.data.clone()  # aligned: see tests/toys.py
    return pipe
