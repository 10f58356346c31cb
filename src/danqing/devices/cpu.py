"""The host's processor: always there, and the reference for every other device."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.devices import native
from danqing.devices.base import Availability, Computes, Device, Memory
from danqing.processor import cpu_flags, cpu_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
_INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}
_FLOAT16_FLAGS = {"avx512_fp16", "amx_fp16", "asimdhp", "fphp"}
_SHOWN_FLAGS = {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_tile", "amx_int8", "sve"}
_FIRST_USE = 48 << 20
"""Bytes of libraries, kernels and threads that are only there once something was computed."""


class Cpu(Device):
    """`cpu`."""

    family = "cpu"

    @classmethod
    def availability(cls) -> Availability:
        """A processor is always there."""
        return Availability(count=1, reason=f"{os.cpu_count()} cores")

    @property
    def name(self) -> str:
        """There is only one."""
        return "cpu"

    @property
    def chip(self) -> str:
        """Model name."""
        return cpu_model()

    @property
    def threads(self) -> int | None:
        """Threads of torch's matrix products."""
        import torch

        return torch.get_num_threads()

    def base_bytes(self) -> int:
        """Return the process's resident set as it is now, and what the first picture brings."""
        return (_status("VmRSS") or 0) + _FIRST_USE

    @property
    def attentions(self) -> Mapping[str, Callable[..., Any]]:
        """Our own kernel, where the processor is one that it is for."""
        return {"native": native.attention} if native.has_attention(cpu_flags()) else {}

    @property
    def fused(self) -> Mapping[str, Callable[..., Any]]:
        """Our own kernels, where the processor is one that they are for."""
        return native.kernels() if native.available(cpu_flags()) else {}

    def preferred(self, dtype: str) -> tuple[str, tuple[str, ...]]:
        """Our own in bfloat16: they round less often than torch's (test_native.py)."""
        if dtype != "bfloat16" or not native.available(cpu_flags()):
            return "auto", ()
        own = "native" if native.has_attention(cpu_flags()) else "auto"
        return own, tuple(native.kernels())

    def int8_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return a linear layer in int8, where the processor has products of bytes."""
        if not _INT8_FLAGS & cpu_flags():
            return None
        from danqing.devices.native.int8 import Int8Linear

        return Int8Linear(weight, bias, scales)

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """Let glibc's allocator keep what tensors give back, instead of unmapping it.

        By default each large tensor is new memory, whose pages are filled with zeros one by one
        when they are touched: FLUX.1's step at 512x512 took 43 s so and 32 s with this, streamed on
        a virtual machine with 2 cores (decision 0013). Where sizes change from layer to
        layer, as in an autoencoder, it would keep twice the memory that is in use. Other C
        libraries are left as they are.
        """
        library = _c_library()
        if library is None:
            yield
            return
        _set_options(library, _KEEPING)
        try:
            yield
        finally:
            _set_options(library, _DEFAULT)
            library.malloc_trim(0)

    def memory(self) -> Memory | None:
        """Return the memory of the host, or of the container if that is smaller."""
        return host_memory()

    def computes(self, dtype: str) -> Computes:
        """Read it off the processor's features."""
        if dtype == "float32":
            return "native"
        wanted = _BFLOAT16_FLAGS if dtype == "bfloat16" else _FLOAT16_FLAGS
        return "native" if wanted & cpu_flags() else "emulated"

    def shares_host_memory(self) -> bool:
        """Mapped weights are used where they are."""
        return True

    def synchronize(self) -> None:
        """Nothing runs behind the program's back."""

    def reset_peak(self) -> None:
        """Reset the process's high-water mark (Linux, proc(5), clear_refs)."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int | None:
        """Return the process's peak resident set, mapped weights included."""
        return _status("VmHWM")

    def release(self) -> None:
        """Give what the allocator keeps back to the system."""
        library = _c_library()
        if library is not None:
            library.malloc_trim(0)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Recognise Python's error and that of torch's allocator."""
        return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of <malloc.h>
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}
_DEFAULT = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 128 << 10}


def _set_options(library: Any, options: Mapping[int, int]) -> None:
    for option, value in options.items():
        library.mallopt(option, value)


@lru_cache(maxsize=1)
def _c_library() -> Any:
    """Return glibc, or None where the C library is another."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def _status(name: str) -> int | None:
    """Return a line of /proc/self/status in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def shown_flags() -> list[str]:
    """Return the features that matter for the speed of a picture."""
    return sorted(cpu_flags() & (_BFLOAT16_FLAGS | _FLOAT16_FLAGS | _SHOWN_FLAGS))


def host_memory() -> Memory | None:
    """Return host memory, bounded by the limit of this control group if it has one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total_bytes, free_bytes = table["MemTotal"], table["MemAvailable"]
    except (OSError, ValueError, LookupError):
        return None
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total_bytes, free_bytes = min(total_bytes, limit), min(free_bytes, limit - used)
    return Memory(total_bytes=total_bytes, free_bytes=max(0, free_bytes))
