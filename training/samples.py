"""Sheets of samples while the transformer learns, before there is a decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from danqing.models.flux import sampling
from training import evaluate, flow
from training.text import clip_ids_of
from training.tokenizers import MAX_TOKENS, load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from training.code import Code
    from training.text import Readers

COUNT = 24
"""Of each kind: geometric scenes that were held out, and landscapes."""
COLUMNS = 12
STEPS = 8
GUIDANCE = 1.6
_SEED = 0


def watcher(
    folder: Path, readers: Readers, code: Code, material: flow.Material
) -> Callable[[Mapping[str, torch.Tensor], int], None]:
    """Return what writes `samples-STEP.png` from averaged weights; always the same prompts."""
    prompts = [prompt for prompt, _ in evaluate.held_out(COUNT)]
    prompts += [prompt for prompt, _ in evaluate.landscapes(COUNT)]
    clip, t5 = load(folder)
    ids = t5(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    told = flow.read(readers, clip_ids_of(clip, prompts, np.random.default_rng(_SEED)), ids)
    untold = flow.read(readers, *material.nothing)
    generator = torch.Generator().manual_seed(_SEED)
    noise = sampling.pack(torch.randn(len(prompts), 16, 16, 16, generator=generator))

    def write(weights: Mapping[str, torch.Tensor], done: int) -> None:
        transformer = flow.make()
        transformer.load_state_dict(dict(weights))
        tokens = flow.sample(
            transformer.eval(), noise, told, steps=STEPS, untold=untold, guidance=GUIDANCE
        )
        latents = sampling.unpack(tokens, 16, 16) / material.scale + material.shift
        images = [Image.fromarray(pixels) for pixels in code.decode(latents)]
        evaluate.sheet(images, COLUMNS, folder / f"samples-{done:05d}.png")

    return write
