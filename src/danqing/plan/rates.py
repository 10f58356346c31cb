"""How fast this machine is, measured once and kept: what a plan's seconds are made of.

Each measurement takes well under a second. They are kept by processor, threads and version of
torch in the user's cache folder, and made anew after a month.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from danqing.cache import add_to_table, cache_folder, read_table
from danqing.weights.ranges import RangeReader, Span, as_memory, lay_out
from danqing.weights.tensor_file import Identity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from danqing.devices import Device

_FILE = "rates.json"
_KEPT_SECONDS = 30 * 24 * 3600
_ROWS, _WIDTH = 1280, 3072
"""Of the matrix product that is timed: that of FLUX.1 at 512x512."""
_SIDE, _CHANNELS = 128, 256
"""Of the convolution that is timed: one of the autoencoder's."""
_READ_BYTES = 1 << 28
_MAPPED_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of one device in one dtype, and of the disk that the weights are on.

    Attributes:
        matmul_flops: operations a second of a matrix product.
        conv_flops: operations a second of a 3x3 convolution.
        read_bytes: bytes a second read past the page cache.
        fill_bytes: bytes a second of memory that is used for the first time.
    """

    matmul_flops: float
    conv_flops: float
    read_bytes: float
    fill_bytes: float


def measured(device: Device, dtype: str, file: Path) -> Rates:
    """Return the rates, from the cache if they are there.

    Args:
        device: what computes.
        dtype: what it computes in.
        file: a large file on the disk in question.
    """
    place = cache_folder() / _FILE
    key = f"{device.name} {device.chip} {device.threads} {dtype} {file.stat().st_dev}"
    kept: Any = read_table(place).get(key)
    try:
        # a date in the future is of a clock that was wrong
        if 0 <= time.time() - kept.pop("when") < _KEPT_SECONDS:
            return Rates(**kept)
    except (TypeError, KeyError, AttributeError):
        pass  # nothing is kept, or not in this form
    found = _measure(device, dtype, file)
    add_to_table(place, key, {**asdict(found), "when": int(time.time())})
    return found


def _measure(device: Device, dtype: str, file: Path) -> Rates:
    import torch
    import torch.nn.functional as F  # noqa: N812

    kind: torch.dtype = getattr(torch, dtype)
    where = device.torch_device
    with torch.inference_mode():
        rows = torch.ones(_ROWS, _WIDTH, dtype=kind, device=where)
        weight = torch.ones(_WIDTH, _WIDTH, dtype=kind, device=where)
        product = _seconds(device, lambda: F.linear(rows, weight))
        picture = torch.ones(1, _CHANNELS, _SIDE, _SIDE, dtype=kind, device=where)
        kernel = torch.ones(_CHANNELS, _CHANNELS, 3, 3, dtype=kind, device=where)
        convolution = _seconds(device, lambda: F.conv2d(picture, kernel, padding=1))
    return Rates(
        matmul_flops=2 * _ROWS * _WIDTH**2 / product,
        conv_flops=2 * (_SIDE * _CHANNELS * 3) ** 2 / convolution,
        read_bytes=_read_rate(device, file),
        fill_bytes=_fill_rate(device),
    )


def _seconds(device: Device, work: Callable[[], object], times: int = 5) -> float:
    found: list[float] = []
    for _ in range(times + 1):
        device.synchronize()
        start = time.perf_counter()
        work()
        device.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def _read_rate(device: Device, file: Path) -> float:
    size = min(file.stat().st_size, _READ_BYTES)
    layout = lay_out([Span(file, Identity.of(file.stat()), 0, size)])
    memory = device.staging(layout.size)
    memory.zero_()  # so that not the first touch of the memory is measured
    reader = RangeReader(direct=True)
    start = time.perf_counter()
    reader.start(layout, as_memory(memory)).wait()
    seconds = time.perf_counter() - start
    reader.close()
    return size / seconds


def _fill_rate(device: Device) -> float:
    start = time.perf_counter()
    device.staging(_MAPPED_BYTES).zero_()
    return _MAPPED_BYTES / (time.perf_counter() - start)
