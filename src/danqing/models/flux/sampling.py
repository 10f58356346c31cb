"""FLUX.1's sampling mathematics as plain functions: packing, position ids, sigmas.

Source of the formulas: Black Forest Labs, flux/sampling.py, and diffusers' FluxPipeline, with which
these agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

PATCH = 2


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Cut latents into patches of 2 x 2.

    Args:
        latents: (batch, channels, height, width), height and width even.

    Returns:
        (batch, height/2 * width/2, channels * 4), channels in the order (channel, row, column).
    """
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Undo `pack`.

    Args:
        tokens: (batch, height/2 * width/2, channels * 4).
        height: of the latents.
        width: of the latents.

    Returns:
        (batch, channels, height, width).
    """
    batch, _, depth = tokens.shape
    channels = depth // (PATCH * PATCH)
    patches = tokens.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def image_ids(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return the position of each patch: (rows * columns, 3) float32, columns (0, row, column).

    Always float32: bfloat16 cannot tell rows above 256 apart.
    """
    ids = torch.zeros(rows, columns, 3, dtype=torch.float32)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(rows * columns, 3).to(device)


def text_ids(tokens: int, device: torch.device) -> torch.Tensor:
    """Return the position of each text token: (tokens, 3) float32, all zero."""
    return torch.zeros(tokens, 3, dtype=torch.float32, device=device)


def base_sigmas(steps: int) -> list[float]:
    """Return the unshifted noise levels at which the model is asked: 1 down to 1/steps."""
    return [float(sigma) for sigma in np.linspace(1.0, 1 / steps, steps)]


def schedule_config(*, guided: bool) -> dict[str, Any]:
    """Return the noise schedule: shifted by resolution except in schnell. BFL, flux/sampling.py."""
    shifted = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
    shifted |= {"max_image_seq_len": 4096, "shift": 3.0, "use_dynamic_shifting": True}
    plain = {"shift": 1.0, "use_dynamic_shifting": False}
    return {"num_train_timesteps": 1000, **(shifted if guided else plain)}
