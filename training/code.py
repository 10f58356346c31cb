"""The latents: a linear code of 8 x 8 patches, fixed before any network is trained.

Each patch of 8 x 8 pixels becomes the 16 largest of its principal components. With the code given,
encoder, decoder and transformer all learn at once from the same fixed target; learned together, the
autoencoder must be finished before the transformer can begin.
The components are brought half way to equal size: left as they are, the flow would see almost only
the patches' mean colours; made quite equal, almost only fine detail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.dataset import CHUNK, pictures

if TYPE_CHECKING:
    from pathlib import Path

PATCH = 8
CHANNELS = 16
_FITTED_TO = 2000
"""Pictures; half a million patches."""


@dataclass(frozen=True)
class Code:
    """A linear code.

    Attributes:
        mean: of the patches, (192,).
        basis: pixels to latents, (192, 16).
    """

    mean: torch.Tensor
    basis: torch.Tensor

    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """Turn (n, h, w, 3) bytes into latents (n, 16, h/8, w/8), float32."""
        latents = (patches_of(pixels) - self.mean) @ self.basis
        return latents.permute(0, 3, 1, 2)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Undo `encode` as well as a linear map can: (n, 16, h/8, w/8) to (n, h, w, 3) bytes."""
        patches = latents.permute(0, 2, 3, 1) @ torch.linalg.pinv(self.basis) + self.mean
        count, rows, columns, _ = patches.shape
        cut = patches.reshape(count, rows, columns, PATCH, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
        pixels = cut.reshape(count, rows * PATCH, columns * PATCH, 3).clamp(-1, 1)
        found: np.ndarray = ((pixels + 1) * 127.5).round().to(torch.uint8).numpy()
        return found


def patches_of(pixels: np.ndarray) -> torch.Tensor:
    """Cut (n, h, w, 3) bytes into patches (n, h/8, w/8, 192) from -1 to 1."""
    values = torch.from_numpy(np.array(pixels)).float() / 127.5 - 1
    count, height, width, _ = values.shape
    cut = values.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return cut.permute(0, 1, 3, 2, 4, 5).reshape(count, height // PATCH, width // PATCH, -1)


def fit(folder: Path) -> Code:
    """Find the code from the first pictures of the training set."""
    patches = patches_of(np.array(pictures(folder / "pictures", 0)[:_FITTED_TO])).reshape(-1, 192)
    mean = patches.double().mean(0)
    centred = patches.double() - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    vectors *= vectors.sum(0).sign()  # eigenvectors have no sign of their own
    return Code(mean.float(), (vectors / values.sqrt().sqrt()).float())


def encode_all(code: Code, folder: Path, *, chunks: int) -> torch.Tensor:
    """Return the latents of all pictures, (pictures, 16, 16, 16), bfloat16."""
    place = folder / f"latents-{chunks}.npy"
    if not place.exists():
        found = []
        for chunk in range(chunks):
            data = pictures(folder / "pictures", chunk)
            for start in range(0, CHUNK, 250):
                latents = code.encode(data[start : start + 250])
                found.append(latents.to(torch.bfloat16).contiguous())
        part = place.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, torch.cat(found).view(torch.uint16).numpy())
        part.rename(place)
    return torch.from_numpy(np.load(place)).view(torch.bfloat16)
