"""The plot of the losses of all stages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

STAGES = ("text", "autoencoder", "flow", "straight")


def losses(folder: Path, place: Path) -> None:
    """Draw the logs in a folder, a panel for each stage."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    stages = [stage for stage in STAGES if (folder / f"{stage}.jsonl").exists()]
    figure, panels = plt.subplots(1, len(stages), figsize=(4 * len(stages), 3))
    for panel, stage in zip(panels, stages, strict=True):
        rows = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
        panel.semilogy([row["step"] for row in rows], [row["loss"] for row in rows])
        panel.set_title(f"{stage}: {rows[-1]['loss']:.4f}")
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(place, dpi=100)
    plt.close(figure)
