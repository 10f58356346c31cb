"""Every place that depends on how torch is made inside, not on its public interface.

Each function names the versions it was seen in: 2.9.0 and 2.13.0, the oldest and the newest that
danqing runs on. `tests/networks/test_insides.py` says which of them no longer fits.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def put_tensor(layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of any device and shape.

    `load_state_dict(assign=True)` would refuse other shapes, such as the empty ones of streamed
    tensors. Relies on `Module._parameters` and `Module._buffers` (torch 2.9.0 and 2.13.0).
    """
    if name in layer._parameters:  # noqa: SLF001
        layer._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)  # noqa: SLF001
    else:
        layer._buffers[name] = tensor  # noqa: SLF001


def is_watched(layer: torch.nn.Module) -> bool:
    """Say whether a forward hook is registered (`Module._forward_hooks`; torch 2.9.0, 2.13.0)."""
    return bool(layer._forward_hooks)  # noqa: SLF001


class WithoutInitialization(TorchFunctionMode):
    """Skips torch's initializers: on the meta device they do nothing, and take their time.

    Relies on them living in `torch.nn.init` and returning their first argument (torch 2.9.0 and
    2.13.0).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, or nothing if it is an initializer."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def compiled_folder() -> str:
    """Return where Inductor keeps its results if TORCHINDUCTOR_CACHE_DIR is not set.

    Relies on `torch._inductor.runtime.cache_dir_utils` (torch 2.9.0 and 2.13.0).
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder: str = default_cache_dir()
    return folder


@contextlib.contextmanager
def while_compiling(start: Callable[..., None], end: Callable[..., None]) -> Iterator[None]:
    """Call `start` and `end` around everything that torch compiles, as long as this lasts.

    Relies on `torch._dynamo.callback` (torch 2.9.0 and 2.13.0).
    """
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)
