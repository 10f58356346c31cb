"""Write the trained networks as an ordinary FLUX.1 folder of diffusers, in bfloat16."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from training import autoencoder, flow, text
from training.tokenizers import load

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.38.0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}
"""As FLUX.1-schnell's: the steps are equally long."""
INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.38.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(
    run: Path,
    target: Path,
    *,
    readers: text.Readers,
    vae: torch.nn.Module,
    transformer: torch.nn.Module,
    shift: float,
    scale: float,
) -> None:
    """Write the checkpoint to `target`, replaced as a whole but for the model card there."""
    unfinished = target.with_name(f".{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(run / name, unfinished / name)
    clip, t5 = load(run)
    clip_config = {
        **text.CLIP_CONFIG,
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": len(clip),
        "bos_token_id": clip.bos_token_id,
        "eos_token_id": clip.eos_token_id,
        "pad_token_id": clip.pad_token_id,
    }
    t5_config = {
        **text.T5_CONFIG,
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": len(t5),
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    vae_config = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.38.0",
        **autoencoder.CONFIG,
        "scaling_factor": scale,
        "shift_factor": shift,
    }
    flow_config = {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.38.0",
        **flow.CONFIG,
    }
    # released checkpoints spell CLIP's names with this prefix and keep T5's tied embedding once
    clip_state = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in readers.clip.state_dict().items()
        if "position_ids" not in name
    }
    t5_state = {
        name: tensor
        for name, tensor in readers.t5.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }
    weights = "diffusion_pytorch_model.safetensors"
    _network(unfinished / "text_encoder", clip_config, clip_state, "model.safetensors")
    _network(unfinished / "text_encoder_2", t5_config, t5_state, "model.safetensors")
    _network(unfinished / "transformer", flow_config, transformer.state_dict(), weights)
    _network(unfinished / "vae", vae_config, vae.state_dict(), weights)
    _json(unfinished / "scheduler" / "scheduler_config.json", SCHEDULER)
    _json(unfinished / "model_index.json", INDEX)
    if (target / "README.md").exists():
        shutil.copy(target / "README.md", unfinished / "README.md")
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


def _network(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor], file: str
) -> None:
    folder.mkdir(parents=True)
    _json(folder / "config.json", config)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / file, metadata={"format": "pt"})


def _json(place: Path, value: Mapping[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
