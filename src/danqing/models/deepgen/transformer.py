"""The transformer of SD3.5 with reference images as more tokens ("Kontext").

It has no weights that stock SD3.5 lacks: the patches of each reference follow those of the latents,
with the places of a picture of their own, and only what comes out for the latents is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from danqing.networks.of_diffusers import run_sd3

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def predict(  # noqa: PLR0917
    transformer: Any,
    latents: Sequence[torch.Tensor],
    references: Sequence[Sequence[torch.Tensor]],
    context: Sequence[torch.Tensor],
    pooled: torch.Tensor,
    timestep: torch.Tensor,
) -> list[torch.Tensor]:
    """Return the velocity for each row; rows of equal sizes are computed together, without mask.

    Args:
        transformer: diffusers' SD3Transformer2DModel.
        latents: of each row, (channels, height, width).
        references: of each row, any number of (channels, height, width).
        context: of each row, (tokens, joint width).
        pooled: (rows, pooled width).
        timestep: (rows,), 0 to 1000, float32.

    Returns:
        Of each row, (channels, height, width).
    """
    out: list[torch.Tensor | None] = [None] * len(latents)
    for rows in _alike(latents, references, context):
        places = torch.tensor(rows, device=pooled.device)
        together = _predict_alike(
            transformer,
            torch.stack([latents[row] for row in rows]),
            [torch.stack(column) for column in zip(*(references[r] for r in rows), strict=True)],
            torch.stack([context[row] for row in rows]),
            pooled[places],
            timestep[places],
        )
        for row, velocity in zip(rows, together, strict=True):
            out[row] = velocity
    return [velocity for velocity in out if velocity is not None]


def _alike(
    latents: Sequence[torch.Tensor],
    references: Sequence[Sequence[torch.Tensor]],
    context: Sequence[torch.Tensor],
) -> Iterable[list[int]]:
    """Return the numbers of the rows, gathered by the sizes of all they hold."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for row, latent in enumerate(latents):
        sizes = (latent.shape, context[row].shape, *(one.shape for one in references[row]))
        groups.setdefault(sizes, []).append(row)
    return groups.values()


def _predict_alike(  # noqa: PLR0917
    transformer: Any,
    latents: torch.Tensor,
    references: Sequence[torch.Tensor],
    context: torch.Tensor,
    pooled: torch.Tensor,
    timestep: torch.Tensor,
) -> torch.Tensor:
    """As `predict`, for rows of equal sizes: (rows, channels, height, width) each."""
    return run_sd3(transformer, [latents, *references], context, pooled, timestep)
