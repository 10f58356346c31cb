"""Opens weights, and the engine over them, the way every command does."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from danqing.models import open_checkpoint

if TYPE_CHECKING:
    from danqing.engine import Engine
    from danqing.options import Options
    from danqing.request import Request
    from danqing.weights import Checkpoint


def open_weights(path: str, options: Options) -> Checkpoint:
    """Open a checkpoint; a `.pt` is read with torch, which danqing imports in its own way."""
    if options.allow_pt:
        from danqing import devices

        devices.import_torch()
    return open_checkpoint(path, options.components, allow_pt=options.allow_pt)


def open_engine(
    checkpoint: Checkpoint,
    options: Options,
    *,
    planned_for: Request | None = None,
    batch: int = 1,
) -> Engine:
    """Open the engine; imports torch, transformers and diffusers.

    Those make a million objects that live as long as the process. Looking through them again and
    again for garbage, while they are imported and once more at exit, took 1.7 of 4.0 seconds
    (`from transformers import CLIPTextModel`, 2 cores, 2026-11-21); so they are left out of it.
    """
    gc.disable()
    try:
        from danqing.engine import Engine

        return Engine.open(checkpoint, options, planned_for=planned_for, batch=batch)
    finally:
        gc.freeze()
        gc.enable()
