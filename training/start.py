"""To go on from a finished checkpoint rather than from nothing: `--start FOLDER`."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from training.text import Readers

if TYPE_CHECKING:
    from pathlib import Path

    import torch

WEIGHTS = "diffusion_pytorch_model.safetensors"


def readers(checkpoint: Path, folder: Path) -> Readers:
    """Return a checkpoint's text encoders; its tokenizers are put in `folder`.

    The heads that told the attributes are not in it: these encoders are not trained any more.
    """
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(checkpoint / name, folder / name, dirs_exist_ok=True)
    found = Readers(folder)
    clip = _state(checkpoint / "text_encoder" / "model.safetensors")
    prefix = "text_model."
    if not any(name.startswith(prefix) for name in found.clip.state_dict()):
        clip = {name.removeprefix(prefix): tensor for name, tensor in clip.items()}
    found.clip.load_state_dict(clip)
    t5 = _state(checkpoint / "text_encoder_2" / "model.safetensors")
    found.t5.load_state_dict({**t5, "encoder.embed_tokens.weight": t5["shared.weight"]})
    return found.eval().requires_grad_(requires_grad=False)


def transformer(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint's transformer, widened to float32."""
    return _state(checkpoint / "transformer" / WEIGHTS)


def autoencoder(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint's autoencoder, widened to float32."""
    return _state(checkpoint / "vae" / WEIGHTS)


def _state(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(path).items()}
