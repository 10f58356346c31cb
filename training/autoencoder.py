"""The autoencoder: AutoencoderKL with FLUX's 16 channels and 8-fold reduction, but narrow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from danqing.pocket.geometry import SIDE
from training.code import PATCH
from training.dataset import CHUNK, is_geometry, pictures
from training.loop import Randomness, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from training.code import Code

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
    "sample_size": 128,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}
BATCH = 16
CROP = 64
"""Pixels; the network is the same everywhere, so it learns from parts of pictures."""
LANDSCAPES = 0.8
"""Share of a batch; the plain grounds of geometric scenes are soon learned."""
EDGE_WEIGHT = 0.5
RATE = 2e-3
LOG_VARIANCE = -6.0
"""Of the encoder's posterior: the code is all but certain."""
BLUR = 0.12
"""Up to how much noise is put into the latents that the decoder learns from, so that it forgives
what the transformer gets wrong; in units of the latents' standard deviation, about 1."""


def make() -> Any:
    """Return the network with fresh weights; the caller has seeded torch."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**CONFIG)


def train(
    folder: Path,
    code: Code,
    *,
    steps: int,
    seed: int,
    chunks: int,
    begin: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """Train it, or go on training it; return it with averaged weights, in eval mode.

    With `begin`, it begins with those weights rather than fresh ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        vae = make().to(memory_format=torch.channels_last)
        if begin is not None:
            vae.load_state_dict(dict(begin))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    stage = Stage(
        name="autoencoder", folder=folder, steps=steps, seed=seed, module=vae,
        optimizers=(optimizer,), average=0.998,
    )  # fmt: skip
    data = [pictures(folder / "pictures", chunk) for chunk in range(chunks)]
    numbers = np.arange(chunks * CHUNK)
    plain = np.asarray([is_geometry(seed, int(number)) for number in numbers])
    landscapes, geometry = numbers[~plain], numbers[plain]

    def losses(randomness: Randomness) -> Mapping[str, torch.Tensor]:
        random = randomness.numpy
        places = np.where(
            random.random(BATCH) < LANDSCAPES,
            landscapes[random.integers(len(landscapes), size=BATCH)],
            geometry[random.integers(len(geometry), size=BATCH)],
        )
        corners = PATCH * randomness.numpy.integers((SIDE - CROP) // PATCH + 1, size=(BATCH, 2))
        batch = np.stack(
            [
                data[place // CHUNK][place % CHUNK][y : y + CROP, x : x + CROP]
                for place, (y, x) in zip(places, corners, strict=True)
            ]
        )
        return _losses(vae, to_tensor(batch), code.encode(batch), randomness)

    stage.run(losses)
    vae.load_state_dict(stage.averaged_state())
    return vae.eval()


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Turn (n, h, w, 3) bytes into (n, 3, h, w) from -1 to 1."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()  # channels last in memory
    return values / 127.5 - 1


def _losses(
    vae: Any, pixels: torch.Tensor, latents: torch.Tensor, randomness: Randomness
) -> Mapping[str, torch.Tensor]:
    """Return the encoder's distance from the code and the decoder's from the pixels."""
    generator = randomness.torch
    strength = BLUR * torch.rand(len(latents), 1, 1, 1, generator=generator)
    blurred = latents + strength * torch.randn(latents.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(blurred).sample.float()
    code = (posterior.mean.float() - latents).square().mean()
    spread = (posterior.logvar.float() - LOG_VARIANCE).square().mean()
    difference = (restored - pixels).abs().mean()
    edges = torch.stack(
        [(restored.diff(dim=axis) - pixels.diff(dim=axis)).abs().mean() for axis in (-1, -2)]
    ).sum()
    loss = difference + EDGE_WEIGHT * edges + 0.2 * code + 0.001 * spread
    return {"loss": loss, "pixels": difference, "code": code}
