"""What flow models share: their noise, the schedule, and the loop of Euler steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    OnStep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
    Velocity = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Predictor:
    """What a family's denoiser does in one step; steps are counted from 0.

    Attributes:
        velocity: from the rows of latents and the step to the velocity of each row.
        embed: from the step to what its modulating layers see: timestep and pooled prompt.
    """

    velocity: Velocity
    embed: Callable[[int], torch.Tensor]


def draw(seed: int, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Draw everything random of one picture, in order; the first is its noise.

    On the CPU and in float32 always, so that a seed means the same numbers on every device and in
    every dtype. What is drawn later does not change what was drawn before.

    Args:
        seed: of PyTorch's CPU generator.
        shapes: of the tensors.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]


def resolution_shift(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Return mu, the shift of the schedule for pictures of this many tokens.

    The line through (256 tokens, 0.5) and (4096 tokens, 1.15), not bounded beyond them.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return tokens * slope + (base_shift - slope * base_tokens)


def shift_of(config: Any, tokens: int) -> float:
    """Return mu for images of this many tokens, from the line that a schedule's config describes.

    Args:
        config: of diffusers' FlowMatchEulerDiscreteScheduler.
        tokens: patches of latents of an image.
    """
    return resolution_shift(
        tokens,
        base_tokens=config.base_image_seq_len,
        max_tokens=config.max_image_seq_len,
        base_shift=config.base_shift,
        max_shift=config.max_shift,
    )


def euler(config: Mapping[str, Any]) -> Any:
    """Return diffusers' scheduler of Euler steps; a fresh one, because it keeps state.

    Its own object is used because its arithmetic (steps in float32, cast behind) is what makes
    latents equal to diffusers' pipelines bit for bit.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(dict(config))


def in_rows(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat conditioning for a batch of images.

    Args:
        tensor: a row of the prompt's, and a second of the negative prompt's under guidance.
        count: images.

    Returns:
        `count` rows of each; the negative prompt's come first, as diffusers' pipelines have them.
    """
    rows = [row for row in range(len(tensor) - 1, -1, -1) for _ in range(count)]
    return tensor[torch.tensor(rows, device=tensor.device)]


def guided(velocity: Velocity, scale: float) -> Velocity:
    """Return a velocity guided away from the negative prompt (https://arxiv.org/abs/2207.12598).

    Args:
        velocity: takes the latents twice: the rows of the negative prompt, then the prompt's.
        scale: how far to go; 1 would be the prompt's velocity itself.
    """

    def predict(latents: torch.Tensor, step: int) -> torch.Tensor:
        away, towards = velocity(torch.cat([latents, latents]), step).chunk(2)
        return away + scale * (towards - away)

    return predict


def sample(
    velocity: Velocity, latents: torch.Tensor, scheduler: Any, at: Callable[[int], None],
    on_step: OnStep,
) -> torch.Tensor:  # fmt: skip
    """Integrate the flow from noise to latents.

    Args:
        velocity: of the latents at a step.
        latents: noise.
        scheduler: ready for the run.
        at: called before each step with its number.
        on_step: called after each step with the number of steps done, the latents and the velocity;
            it returns the latents to go on with.
    """
    for step, timestep in enumerate(scheduler.timesteps):
        at(step)
        towards = velocity(latents, step)
        latents = scheduler.step(towards, timestep, latents, return_dict=False)[0]
        latents = on_step(step + 1, latents, towards)
    return latents
