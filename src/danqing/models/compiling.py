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
    """Let a transformer's repeated blocks be compiled when they are first computed.

    One block of each kind is compiled, and its code runs for all; Inductor's results are kept in
    danqing's cache folder, unless TORCHINDUCTOR_CACHE_DIR names another.

    Args:
        transformer: of diffusers, where it is computed.
        backend: what torch.compile takes.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    keep_compiled(default_cache_dir())
    module: Any = transformer
    module.compile_repeated_blocks(backend=backend)


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
