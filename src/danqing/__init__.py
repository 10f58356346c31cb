"""danqing runs open image models from local weights on any PyTorch device, and proves the picture.

```python
import danqing

with danqing.open("models/FLUX.1-schnell") as engine:
    generation = engine.generate("a photo of a blue pizza", seed=42)
generation.save("pizza.png")
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from danqing.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.engine import Engine
    from danqing.errors import DanqingError
    from danqing.generation import Generation, Picture
    from danqing.options import Options
    from danqing.request import Request

__all__ = [
    "DanqingError", "Engine", "Generation", "Options", "Picture", "Request", "__version__", "open",
]  # fmt: skip

# Imported on first use, so that `import danqing` costs next to nothing and never imports torch.
_HOMES = {
    "DanqingError": "danqing.errors",
    "Engine": "danqing.engine",
    "Generation": "danqing.generation",
    "Options": "danqing.options",
    "Picture": "danqing.generation",
    "Request": "danqing.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module 'danqing' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)


def open(model_path: str | Path = "pocket", **options: Any) -> Engine:  # noqa: A001
    """Open a checkpoint on a device; weights are read when the first image is generated.

    Args:
        model_path: a diffusers folder, a folder or a file of the BFL release, or `pocket`, the
            small model that comes with danqing.
        options: fields of `danqing.Options`: `device="npu:0", memory="8GiB", ...`.

    Returns:
        An engine: a context manager, or closed by hand.

    Raises:
        danqing.errors.UnknownSettingError: unknown option.
        danqing.errors.RequestError: invalid option.
        danqing.errors.CheckpointError: the weights cannot be used; nothing was loaded.
        danqing.errors.DeviceError: device not found, or it does not compute in this dtype.
        danqing.errors.DoesNotFitError: the plan does not fit in the device's memory.
    """
    from danqing.engine import Engine
    from danqing.options import Options

    return Engine.open(model_path, Options(**options))
