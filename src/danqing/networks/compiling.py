"""What torch.compile takes: how long, apart from the arithmetic, and where its results are kept."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from danqing.cache import keep_compiled
from danqing.networks import of_torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@dataclass
class CompileClock:
    """Seconds spent compiling so far, read from the cache or anew."""

    seconds: float = 0.0


def compile_blocks(transformer: torch.nn.Module, backend: Any) -> None:
    """Compile each block of a transformer when it is first computed.

    Blocks of one class share their code. Inductor's results are kept in danqing's cache folder,
    unless TORCHINDUCTOR_CACHE_DIR names another. diffusers' `compile_repeated_blocks` does the
    same, but not for every transformer: SD3's does not name its blocks (diffusers 0.42.1).

    Args:
        transformer: on the device that computes it.
        backend: a backend of torch.compile.
    """
    from danqing.networks.units import blocks_of

    keep_compiled(of_torch.compiled_folder())
    for _, block in blocks_of(transformer):
        block.compile(backend=backend)


@contextlib.contextmanager
def clocked() -> Iterator[CompileClock]:
    """Count the seconds that are spent compiling as long as this lasts."""
    clock = CompileClock()
    began = 0.0

    def start(*_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(*_: Any) -> None:
        clock.seconds += time.perf_counter() - began

    with of_torch.while_compiling(start, end):
        yield clock
