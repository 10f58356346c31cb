"""What torch.compile takes: how long, apart from the arithmetic, and where its results are kept."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from danqing.cache import keep_compiled

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
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from danqing.networks.streaming import blocks_of

    keep_compiled(default_cache_dir())
    for _, block in blocks_of(transformer):
        block.compile(backend=backend)


@contextlib.contextmanager
def clocked() -> Iterator[CompileClock]:
    """Count the seconds that are spent compiling as long as this lasts."""
    from torch._dynamo.callback import callback_handler

    clock = CompileClock()
    began = 0.0

    def start(*_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(*_: Any) -> None:
        clock.seconds += time.perf_counter() - began

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield clock
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)
