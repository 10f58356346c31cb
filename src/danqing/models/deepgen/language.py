"""Qwen2.5-VL read forward once: what it makes of a prompt, of pictures and of the queries.

Nothing is generated, so the last layer, the final norm and the head over the vocabulary are never
computed, nor read from disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

from danqing.networks.of_transformers import (
    keep_layers,
    output_of,
    run_vision_tower,
    run_without_attention,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

EVERY = 6
"""Layers between two of the states that are taken."""
SEEN = 0.875
"""Side of what the vision tower sees, as a share of what the autoencoder does: 28 of 32 pixels."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures CLIP was trained with, by channel."""


def depths(layers: int) -> list[int]:
    """Return the layers whose output is taken, counted from 1, deepest first: 35, 29, ... 5."""
    return list(range(layers - 1, 0, -EVERY))


def trim(vlm: Any) -> None:
    """Drop what no state depends on: the last layer and the final norm."""
    keep_layers(vlm.language_model, depths(len(vlm.language_model.layers))[0])


def tokens_of(height: int, width: int) -> int:
    """Return how many tokens a picture of this size becomes, sides being multiples of 32."""
    return (height // 32) * (width // 32)


def see(vlm: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return what the vision tower makes of a picture.

    Args:
        vlm: with `visual`.
        pixels: (1, 3, height, width), -1 to 1, in the tower's dtype; sides are multiples of 32. On
            the CPU: how a picture is made smaller is then the same for every device.

    Returns:
        (tokens, hidden), and the rows and columns of tokens: one for each 32 x 32 pixels.
    """
    tower = vlm.visual
    patch, merge = tower.config.patch_size, tower.config.spatial_merge_size
    smaller = F.interpolate(pixels, scale_factor=SEEN, mode="bilinear", align_corners=False)
    mean, deviation = (
        torch.tensor(values, dtype=pixels.dtype, device=pixels.device)[:, None, None]
        for values in (MEAN, DEVIATION)
    )
    normal = ((smaller + 1) / 2 - mean) / deviation
    rows, columns = (side // patch for side in normal.shape[-2:])
    frames = tower.config.temporal_patch_size
    blocks = normal.reshape(-1, rows // merge, merge, patch, columns // merge, merge, patch)
    # (c, H, m, p, W, m, p) -> (H, W, m, m, c, p, p); a patch lists channel, frame, row, column
    blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)
    patches = blocks[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1).to(vlm.device)
    # the few whole numbers that say where each patch is are worked out on the CPU: on an NPU they
    # would be a dozen small kernels, some of which it has only in an older kind
    grid = torch.tensor([[1, rows, columns]])
    features = run_vision_tower(tower, patches, grid)
    return features, (rows // merge, columns // merge)


def embed(
    vlm: Any,
    ids: torch.Tensor,
    image_token: int,
    features: Sequence[torch.Tensor],
    queries: torch.Tensor,
) -> torch.Tensor:
    """Return the embeddings of a row: words, pictures in their places, then the queries.

    Args:
        vlm: with `language_model`.
        ids: (tokens,), on the CPU.
        image_token: id of the tokens that stand for pictures.
        features: of each picture, (its tokens, hidden).
        queries: (queries, hidden).

    Returns:
        (1, tokens + queries, hidden).
    """
    words = vlm.language_model.embed_tokens(ids.to(queries.device))
    if features:
        places = (ids == image_token).nonzero()[:, 0].to(words.device)
        words = words.index_copy(0, places, torch.cat(list(features)).to(words.dtype))
    return torch.cat([words, queries.to(words.dtype)])[None]


def states(vlm: Any, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the states after six depths, stacked by channels.

    Args:
        vlm: trimmed.
        embeds: (rows, tokens, hidden), without padding, so no mask is needed.
        positions: (3, rows, tokens).

    Returns:
        (rows, tokens, 6 * hidden), the deepest first.
    """
    text = vlm.language_model
    found: dict[int, torch.Tensor] = {}
    wanted = depths(len(text.layers) + 1)

    def keep(depth: int) -> Any:
        def hook(_: Any, __: Any, out: Any) -> None:
            found[depth] = output_of(out)

        return hook

    hooks = [text.layers[depth - 1].register_forward_hook(keep(depth)) for depth in wanted]
    try:
        text(inputs_embeds=embeds, position_ids=positions.to(embeds.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([found[depth] for depth in wanted], dim=-1)


def padding_states(vlm: Any, pad: int) -> torch.Tensor:
    """Return the stacked states of one padding token.

    The original attends with FlashAttention, which leaves zero for rows that attend to nothing: a
    padding token's state is what the perceptrons alone make of its embedding, wherever it stands.
    Computed so, it does not depend on what a device's attention does with such rows.

    Args:
        vlm: trimmed.
        pad: the padding token.

    Returns:
        (6 * hidden,).
    """
    text = vlm.language_model
    wanted = depths(len(text.layers) + 1)
    state = text.embed_tokens(torch.tensor([pad], device=text.embed_tokens.weight.device))
    found = {}
    for depth, layer in enumerate(text.layers, start=1):
        state = run_without_attention(layer, state)
        found[depth] = state
    return torch.cat([found[depth][0] for depth in wanted])


def padded(row: torch.Tensor, width: int, padding: torch.Tensor | None) -> torch.Tensor:
    """Put padding before a row of states until it is `width` tokens long."""
    missing = width - row.shape[1]
    if not missing or padding is None:
        return row
    return torch.cat([padding.expand(1, missing, -1), row], dim=1)
