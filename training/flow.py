"""The transformer: a small FLUX.1, trained as a rectified flow in the autoencoder's latents.

The picture is x0, the noise x1, and between them x_t = (1 - t) x0 + t x1; the network learns the
velocity x1 - x0 (Liu, Gong, Liu: Flow Straight and Fast, 2022; Esser et al.: Scaling Rectified Flow
Transformers for High-Resolution Image Synthesis, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from danqing.models.flux import sampling
from training import labels
from training.captions import write
from training.code import encode_all, fit
from training.dataset import CHUNK, scene
from training.loop import Randomness, Stage
from training.scenes import Geometry
from training.text import CLIP_CONFIG, CLIP_SHOWN, T5_CONFIG, clip_ids_of
from training.tokenizers import MAX_TOKENS, load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from training.text import Readers

CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": T5_CONFIG["d_model"],
    "pooled_projection_dim": CLIP_CONFIG["hidden_size"],
    "guidance_embeds": False,
    "axes_dims_rope": [8, 12, 12],
}
BATCH = 64
MUON_RATE = 1.2e-3
ADAM_RATE = 1.2e-3
WORDINGS = 3
"""Sentences written for each scene."""
SHARES = {"landscape": 26, "one": 5, "pair": 20, "many": 13}
"""Of a batch, by kind of scene. Two things in a relation are the hardest to learn: which shape and
which colour belongs to which of them. Drawn as the scenes come, they were a fifth of a batch, and
were still mixed up when all else was painted well."""
LANDSCAPE_WEIGHT = 0.75
GEOMETRY_WEIGHT = 1.2
"""Landscapes, whose texture nothing foretells, fill most of the loss if they weigh the same."""
BOATS_WEIGHT = 3.0
"""Of the tokens where a boat is: a dark hull on dark water is little of a picture's loss."""
LABELS_WEIGHT = 0.1
LABELS_AFTER = 1
"""Number of the single block behind which the labels are told."""
UNTOLD = 0.1
"""Share of the samples whose sentence is left out, for guidance in the next stage."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the transformer learns from, all of it in memory.

    Attributes:
        latents: (scenes, 16, 16, 16), bfloat16, as the encoder gave them.
        shift: mean of all latents.
        scale: one over their standard deviation.
        clip_ids: (scenes, wordings, tokens).
        t5_ids: (scenes, wordings, tokens).
        nothing: the token ids of the empty sentence, of CLIP and of T5.
        kinds: numbers of the scenes of each kind, in the order of `SHARES`.
        labels: (scenes, 3, 64), int8: what lies at each image token.
    """

    latents: torch.Tensor
    shift: float
    scale: float
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    nothing: tuple[torch.Tensor, torch.Tensor]
    kinds: tuple[np.ndarray, ...]
    labels: torch.Tensor

    def batch(self, randomness: Randomness) -> tuple[torch.Tensor, ...]:
        """Draw a batch, the landscapes first.

        Returns:
            Packed latents (64, 64, 64), normalised; token ids of CLIP and of T5; the labels.
        """
        random = randomness.numpy
        drawn = [
            kind[random.integers(len(kind), size=count)]
            for kind, count in zip(self.kinds, SHARES.values(), strict=True)
        ]
        places = torch.from_numpy(np.concatenate(drawn))
        wording = torch.from_numpy(random.integers(WORDINGS, size=BATCH))
        latents = (self.latents[places].float() - self.shift) * self.scale
        ids = self.clip_ids[places, wording], self.t5_ids[places, wording]
        return sampling.pack(latents), *(found.long() for found in ids), self.labels[places]


def gather(folder: Path, *, seed: int, chunks: int) -> Material:
    """Read the latents and write the sentences; both are kept in `folder`."""
    latents = encode_all(fit(folder), folder, chunks=chunks)
    sample = latents[:4000].float()
    clip, t5 = load(folder)
    ids = _token_ids(folder, clip, t5, seed=seed, count=chunks * CHUNK)
    kinds, lies = _kinds_and_labels(seed, chunks * CHUNK)
    empty = clip_ids_of(clip, [""], np.random.default_rng(0))[:, : ids[0].shape[-1]]
    empty_t5 = t5([""], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    return Material(
        latents=latents,
        shift=float(sample.mean()),
        scale=float(1 / sample.std()),
        clip_ids=ids[0],
        t5_ids=ids[1],
        nothing=(empty, empty_t5),
        kinds=kinds,
        labels=lies,
    )


def _kinds_and_labels(seed: int, count: int) -> tuple[tuple[np.ndarray, ...], torch.Tensor]:
    """Draw the scenes again: the numbers of each kind, and what lies where in each."""
    kinds: dict[str, list[int]] = {kind: [] for kind in SHARES}
    found = np.empty((count, len(labels.KINDS), labels.GRID**2), np.int8)
    for index in range(count):
        what, _ = scene(seed, index)
        kinds[what.kind if isinstance(what, Geometry) else "landscape"].append(index)
        found[index] = labels.of_scene(what)
    return tuple(np.asarray(rows) for rows in kinds.values()), torch.from_numpy(found)


def _token_ids(
    folder: Path, clip: Any, t5: Any, *, seed: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    place = folder / f"tokens-{count}.npz"
    if not place.exists():
        found: tuple[list[Any], list[Any]] = ([], [])
        for start in range(0, count, CHUNK):
            texts = [
                write(scene(seed, index)[0], np.random.default_rng([seed, index, wording]))
                for index in range(start, start + CHUNK)
                for wording in range(WORDINGS)
            ]
            clip_ids = clip_ids_of(clip, texts, np.random.default_rng([seed, start]))
            t5_ids = t5(
                texts, padding="max_length", max_length=MAX_TOKENS, truncation=True,
                return_tensors="np",
            ).input_ids  # fmt: skip
            found[0].append(clip_ids.numpy()[:, :CLIP_SHOWN].astype(np.int16))
            found[1].append(t5_ids.astype(np.int16))
        part = place.with_suffix(".part.npz")
        np.savez(part, clip=np.concatenate(found[0]), t5=np.concatenate(found[1]))
        part.rename(place)
    arrays = np.load(place)
    shaped = (arrays[name].reshape(count, WORDINGS, -1) for name in ("clip", "t5"))
    first, second = (torch.from_numpy(array) for array in shaped)
    return first, second


def make() -> Any:
    """Return the transformer with fresh weights: every block begins as the identity."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(**CONFIG)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.startswith("proj_out.") or (".norm" in name and ".linear." in name):
                parameter.zero_()
            elif parameter.ndim == 2 and "blocks" in name:
                torch.nn.init.xavier_uniform_(parameter)
    return transformer


def optimizers(module: torch.nn.Module, scale: float = 1.0) -> tuple[torch.optim.Optimizer, ...]:
    """Return Muon for the matrices inside the blocks, AdamW for all other parameters."""
    inner = [
        parameter
        for name, parameter in module.named_parameters()
        if "transformer_blocks." in name and parameter.ndim == 2 and ".norm" not in name
    ]
    chosen = {id(parameter) for parameter in inner}
    others = [parameter for parameter in module.parameters() if id(parameter) not in chosen]
    return (
        torch.optim.Muon(
            inner, lr=MUON_RATE * scale, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=ADAM_RATE * scale, betas=(0.9, 0.98), weight_decay=0.0),
    )


def train(
    folder: Path,
    readers: Readers,
    material: Material,
    *,
    steps: int,
    seed: int,
    begin: Mapping[str, torch.Tensor] | None = None,
    show: Callable[[Any, int], None] | None = None,
    every: int = 0,
) -> Any:
    """Train it, or go on training it; return it with averaged weights.

    Args:
        folder: of states and logs.
        readers: the text encoders, which stay as they are.
        material: what it learns from.
        steps: how many.
        seed: of everything random.
        begin: weights to begin with; fresh ones if there are none.
        show: is called with averaged weights and the number of steps.
        every: steps between two calls of `show`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        transformer = make()
        if begin is not None:
            transformer.load_state_dict(dict(begin))
        learner = labels.Learner(transformer, after=LABELS_AFTER)
    compile_blocks(transformer)
    stage = Stage(
        name="flow", folder=folder, steps=steps, seed=seed, module=learner,
        optimizers=optimizers(learner), average=0.9985, warm_up=100, cooled=0.03,
    )  # fmt: skip
    weight = torch.full((BATCH,), GEOMETRY_WEIGHT)
    weight[: SHARES["landscape"]] = LANDSCAPE_WEIGHT

    def losses(randomness: Randomness) -> Mapping[str, torch.Tensor]:
        latents, clip_ids, t5_ids, lies = material.batch(randomness)
        untold = torch.from_numpy(randomness.numpy.random(BATCH) < UNTOLD)
        clip_ids = torch.where(untold[:, None], material.nothing[0], clip_ids)
        t5_ids = torch.where(untold[:, None], material.nothing[1], t5_ids)
        noise = torch.randn(latents.shape, generator=randomness.torch)
        times = draw_times(randomness, BATCH)
        mixed = torch.lerp(latents, noise, times[:, None, None])
        states, pooled = read(readers, clip_ids, t5_ids)
        velocity = predict(transformer, mixed, times, states, pooled)
        away = (velocity - (noise - latents)).square().mean(2)
        boats = 1 + (BOATS_WEIGHT - 1) * (lies[:, labels.BOAT] > 0)
        unread, right, boats_right = learner.loss(
            lies.where(~untold[:, None, None], labels.UNKNOWN)
        )
        return {
            "loss": (weight * (boats * away).mean(1)).mean() + LABELS_WEIGHT * unread,
            "flow": away.mean(), "labels": unread, "labels_right": right,
            "boats_right": boats_right,
        }  # fmt: skip

    def transformer_of(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        prefix = "transformer."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }

    def display(done: int) -> None:
        if show:
            show(transformer_of(stage.averaged_state()), done)

    stage.run(losses, every=every, show=display)
    finished = make()
    finished.load_state_dict(transformer_of(stage.averaged_state()))
    return finished.eval()


def draw_times(randomness: Randomness, count: int) -> torch.Tensor:
    """Draw times: half of them logit-normal about 0.6, half uniform.

    Larger times were tried, where a picture is laid out: shapes were then known, and badly drawn.
    """
    normal = torch.sigmoid(torch.randn(count, generator=randomness.torch) + 0.4)
    uniform = torch.rand(count, generator=randomness.torch)
    return torch.where(torch.rand(count, generator=randomness.torch) < 0.5, normal, uniform)


def compile_blocks(transformer: Any) -> None:
    """Compile each block, for training.

    Attention is spelled out: going backward through torch's flash attention for the CPU took half
    the time of a step (torch 2.13, 104 tokens).
    """
    transformer.set_attention_backend("_native_math")
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.forward = torch.compile(block.forward)  # hooks stay outside


@torch.no_grad()
def read(
    readers: Readers, clip_ids: torch.Tensor, t5_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states of both text encoders."""
    with torch.autocast("cpu", torch.bfloat16):
        states, pooled = readers.embed(clip_ids, t5_ids)
    return states.float(), pooled.float()


def predict(
    transformer: Any,
    latents: torch.Tensor,
    times: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    """Return the velocity at packed latents (n, 64, 64), as the pipeline calls the network."""
    side = round(latents.shape[1] ** 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        velocity: torch.Tensor = transformer(
            hidden_states=latents,
            timestep=times,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            txt_ids=sampling.text_ids(states.shape[1], latents.device),
            img_ids=sampling.image_ids(side, side, latents.device),
            guidance=None,
            return_dict=False,
        )[0]
    return velocity.float()


@torch.no_grad()
def sample(
    transformer: Any,
    noise: torch.Tensor,
    told: tuple[torch.Tensor, torch.Tensor],
    *,
    steps: int,
    untold: tuple[torch.Tensor, torch.Tensor] | None = None,
    guidance: float = 1.0,
) -> torch.Tensor:
    """Integrate from noise to latents with Euler steps, guided away from the untold if given."""
    latents, count = noise, len(noise)
    for step in range(steps):
        times = torch.full((count,), 1 - step / steps)
        velocity = predict(transformer, latents, times, *told)
        if untold is not None and guidance != 1:
            away = predict(
                transformer,
                latents,
                times,
                *(part.expand(count, *part.shape[1:]) for part in untold),
            )
            velocity = away + guidance * (velocity - away)
        latents = latents - velocity / steps
    return latents
