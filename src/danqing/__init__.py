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
    from collections.abc import Mapping
    from pathlib import Path

    from danqing.engine import Engine
    from danqing.errors import DanqingError
    from danqing.generation import Generation, Picture
    from danqing.request import Request

__all__ = ["DanqingError", "Engine", "Generation", "Picture", "Request", "__version__", "open"]

# Imported on first use, so that `import danqing` costs next to nothing and never imports torch.
_HOMES = {
    "DanqingError": "danqing.errors",
    "Engine": "danqing.engine",
    "Generation": "danqing.generation",
    "Picture": "danqing.generation",
    "Request": "danqing.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module 'danqing' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)


def open(  # noqa: A001
    model_path: str | Path = "pocket",
    *,
    device: str = "auto",
    dtype: str = "auto",
    placement: str = "auto",
    memory: int | None = None,
    tile: str = "auto",
    quantise: str = "off",
    prompt_cache: str | Path | None = None,
    attention: str = "auto",
    deterministic: bool = False,
    compile_with: str = "off",
    fused: str = "auto",
    place: Mapping[str, str] | None = None,
    components: Mapping[str, str | Path] | None = None,
    allow_pt: bool = False,
) -> Engine:
    """Open a checkpoint on a device; nothing is read from the weights until the first picture.

    Args:
        model_path: a diffusers folder, a folder with the files of the BFL release, or one of these
            files; `pocket` is the small model that comes with danqing.
        device: `auto`, `cpu`, `cuda[:i]`, `npu[:i]`, `xpu[:i]` or `mps`.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        placement: `auto`; `resident`: all weights stay on the device; `staged`: each stage's are
            read when it begins and leave when it ends; or `streamed`: so, and the blocks of the
            large ones are read while they are computed.
        memory: bytes that a run may take: of the device, or on a CPU of the process; left out,
            nine tenths of what is free.
        tile: `auto`: pictures are decoded in tiles if they do not fit whole; `off`; or the side
            of the tiles in pixels.
        quantise: `off`; or `int8`: the transformer's blocks compute with bytes, which is faster and
            not exact.
        prompt_cache: a folder where what prompts became is kept: one that comes again needs no text
            encoder.
        attention: `auto`: our own on a CPU in bfloat16 where it is for that CPU, else `torch`: the
            kernel torch prefers; or `native`, `math`, `flash`, `efficient`, `cudnn`; on an NPU
            also `npu` or `mindie`.
        deterministic: compute with kernels only that give the same bits again, even if slower.
        compile_with: `off`; or compile the transformer's blocks: `inductor`, on an NPU `npugraph`
            or `torchair`.
        fused: `auto`: our own on a CPU, as with `attention`; `off`, `all`, or names of the device's
            fused kernels with commas between.
        place: devices of single components, by name: `{"vlm": "npu:1"}`.
        components: places of single components, by name: `{"t5": "models/t5-v1_1-xxl"}`.
        allow_pt: `model_path` is DeepGen's original `.pt`, and may be opened: of tensors only.

    Returns:
        An engine, to be used as a context manager or closed by hand.

    Raises:
        danqing.errors.CheckpointError: the weights cannot be used; nothing was loaded.
        danqing.errors.DeviceError: the device is not there, or does not compute in this dtype.
        danqing.errors.DoesNotFitError: the plan does not fit in the device's memory.
    """
    from danqing.engine import Engine

    return Engine.open(
        model_path,
        device=device,
        dtype=dtype,
        placement=placement,
        memory=memory,
        tile=tile,
        quantise=quantise,
        prompt_cache=prompt_cache,
        attention=attention,
        deterministic=deterministic,
        compile_with=compile_with,
        fused=fused,
        place=place,
        components=components,
        allow_pt=allow_pt,
    )
