"""`danqing convert`: the same weights in another layout or dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from danqing.cli.opening import open_weights
from danqing.cli.terminal import overwrite
from danqing.quantities import size

if TYPE_CHECKING:
    from danqing.cli.jobs.convert import Converting


def run(job: Converting) -> None:
    """Write the weights and say where they are."""
    checkpoint = open_weights(job.source, job.options)
    from danqing.models.convert import convert

    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if percent != shown and not job.quiet and sys.stderr.isatty():
            shown = percent
            overwrite(f"{percent:3d} % of {size(total)}")

    convert(checkpoint, Path(job.target), layout=job.layout, dtype=job.dtype, on_bytes=show)
    if not job.quiet:
        if shown >= 0:
            print(file=sys.stderr)
        print(f"{job.target}: {job.layout}, from {checkpoint.layout} {checkpoint.path}")
