"""What CUDA, NPU and XPU have in common: `torch.<family>` modules with the same functions."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import TYPE_CHECKING, Any

from danqing.devices.base import Computes, Device, Memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import torch


class Accelerator(Device):
    """A device with its own memory, driven through `torch.<family>`."""

    @property
    def module(self) -> ModuleType:
        """The family's module in torch."""
        import torch

        module: ModuleType = getattr(torch, self.family)
        return module

    @cached_property
    def properties(self) -> Any:
        """What the driver says about the chip."""
        return self.module.get_device_properties(self.index)

    def prepare(self) -> None:
        """Make it the current device of this thread."""
        self.module.set_device(self.index)

    @property
    def chip(self) -> str:
        """Name as the driver gives it."""
        return str(self.properties.name)

    def memory(self) -> Memory | None:
        """Return the device's own memory."""
        free_bytes, total_bytes = self.module.mem_get_info(self.index)
        return Memory(total_bytes=total_bytes, free_bytes=free_bytes)

    def computes(self, dtype: str) -> Computes:
        """Say what the driver says; float16 and float32 are everywhere."""
        if dtype == "bfloat16" and not self.module.is_bf16_supported():
            return "no"
        return "native"

    def staging(self, size: int) -> torch.Tensor:
        """Return pinned memory, which the device copies from by itself."""
        import torch

        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    @contextlib.contextmanager
    def uploading(self) -> Iterator[None]:
        """Copy in a queue of its own."""
        self.module.set_device(self.index)  # of this thread
        with self.module.stream(self._copies):
            yield
            self._copies.synchronize()

    @cached_property
    def _copies(self) -> Any:
        return self.module.Stream(self.index)

    def adopt(self, tensor: torch.Tensor) -> None:
        """Keep its memory until the computing queue is done with it."""
        tensor.record_stream(self.module.current_stream(self.index))

    def synchronize(self) -> None:
        """Wait for the device's queue."""
        self.module.synchronize(self.index)

    def reset_peak(self) -> None:
        """Reset the allocator's high-water mark."""
        self.module.reset_peak_memory_stats(self.index)

    def peak_bytes(self) -> int | None:
        """Return the allocator's high-water mark."""
        return int(self.module.max_memory_allocated(self.index))

    def release(self) -> None:
        """Empty the allocator's cache."""
        self.module.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Recognise torch's error, and older builds' plain one by its text."""
        import torch

        return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
