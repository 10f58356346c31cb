"""`danqing convert`: the same weights in another layout or dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from danqing.cli.generate import open_weights
from danqing.cli.terminal import overwrite
from danqing.quantities import size

if TYPE_CHECKING:
    from collections.abc import Mapping


def run(
    source: str,
    target: str,
    components: Mapping[str, str],
    *,
    layout: str,
    dtype: str,
    allow_pt: bool,
    quiet: bool,
) -> None:
    """Write the weights and say where they are."""
    checkpoint = open_weights(source, components, allow_pt=allow_pt)
    from danqing.models.convert import convert

    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if percent != shown and not quiet and sys.stderr.isatty():
            shown = percent
            overwrite(f"{percent:3d} % of {size(total)}")

    convert(checkpoint, Path(target), layout=layout, dtype=dtype, on_bytes=show)
    if not quiet:
        if shown >= 0:
            print(file=sys.stderr)
        print(f"{target}: {layout}, from {checkpoint.layout} {checkpoint.path}")
