"""The second training of the transformer: fewer, longer steps, and guidance built in.

The flow as first trained is integrated in many short steps and, to keep closely to the sentence,
with classifier-free guidance, at two evaluations a step. Here a copy of it learns to take each of
FLUX.1-schnell's four steps at once: from a picture mixed with noise at the step's beginning, the
first model integrates to the step's end in short guided steps, and the copy learns the straight
line between the two (after Salimans, Ho: Progressive Distillation, 2022, and Meng et al.: On
Distillation of Guided Diffusion Models, 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from training import flow
from training.loop import Randomness, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from training.text import Readers

STEPS = 4
SHORT_STEPS = 3
"""Steps of the first model within one of the copy."""
GUIDANCE = 2.0
ANY_TIME = 0.2
"""Share of the samples that begin at any time, so that other numbers of steps keep working."""
RATE = 0.3
"""Of the first training's learning rates."""


def train(
    folder: Path,
    readers: Readers,
    material: flow.Material,
    teacher: Any,
    *,
    steps: int,
    seed: int,
) -> Any:
    """Train the copy, or go on training it; return it with averaged weights."""
    student = flow.make()
    student.load_state_dict(teacher.state_dict())
    flow.compile_blocks(student)
    stage = Stage(
        name="straight", folder=folder, steps=steps, seed=seed, module=student,
        optimizers=flow.optimizers(student, RATE), average=0.99, warm_up=30, cooled=0.05,
    )  # fmt: skip
    nothing = flow.read(readers, *material.nothing)

    def losses(randomness: Randomness) -> Mapping[str, torch.Tensor]:
        latents, clip_ids, t5_ids, _ = material.batch(randomness)
        told = flow.read(readers, clip_ids, t5_ids)
        noise = torch.randn(latents.shape, generator=randomness.torch)
        start, length = _draw_steps(randomness)
        mixed = torch.lerp(latents, noise, start[:, None, None])
        end = _integrate(teacher, mixed, start, length, told=told, nothing=nothing)
        target = (mixed - end) / length[:, None, None]
        velocity = flow.predict(student, mixed, start, *told)
        return {"loss": (velocity - target).square().mean()}

    stage.run(losses)
    student.load_state_dict(stage.averaged_state())
    return student.eval()


def _draw_steps(randomness: Randomness) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the time each sample begins at and the length of its step."""
    generator = randomness.torch
    start = (1 + torch.randint(STEPS, (flow.BATCH,), generator=generator)) / STEPS
    length = torch.full((flow.BATCH,), 1 / STEPS)
    anywhere = torch.rand(flow.BATCH, generator=generator).clamp(min=0.02)
    chosen = torch.rand(flow.BATCH, generator=generator) < ANY_TIME
    return (
        torch.where(chosen, anywhere, start),
        torch.where(chosen, torch.minimum(anywhere, torch.tensor(1 / (2 * STEPS))), length),
    )


@torch.no_grad()
def _integrate(
    teacher: Any,
    latents: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    *,
    told: tuple[torch.Tensor, torch.Tensor],
    nothing: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Follow the first model's guided flow from `start` over `length`, in short Euler steps."""
    states = torch.cat([told[0], nothing[0].expand_as(told[0])])
    pooled = torch.cat([told[1], nothing[1].expand_as(told[1])])
    for step in range(SHORT_STEPS):
        times = start - length * step / SHORT_STEPS
        both = flow.predict(teacher, latents.repeat(2, 1, 1), times.repeat(2), states, pooled)
        guided, away = both.chunk(2)
        velocity = away + GUIDANCE * (guided - away)
        latents = latents - velocity * (length / SHORT_STEPS)[:, None, None]
    return latents
