"""`torch.npu` of the simulated device: the functions of torch_npu's module, over counters."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from danqing.devices.ascend_chips import Chip

_SOC_VERSIONS = {
    "910A": 102, "310P3": 202, "910B1": 220, "910B2": 221, "910B2C": 222, "910B3": 223,
    "910B4": 224, "910B4-1": 225, "910_93": 250,
}  # fmt: skip


def make_module(native: Any, chip: Callable[[], Chip]) -> types.ModuleType:
    """Return the module; its functions mirror torch.cuda's, as torch_npu's do."""
    module = types.ModuleType("torch.npu", "The simulated NPU: CPU arithmetic, no hardware.")
    for part in (_devices(native), _memory(native), _random(native), _chip(native, chip)):
        vars(module).update(part)
    vars(module).update(_streams(native))
    return module


def _index(native: Any, device: Any = None) -> int:
    if device is None:
        return int(native.current_device())
    if isinstance(device, int):
        return device
    found: int | None = torch.device(device).index
    return int(native.current_device()) if found is None else found


def _devices(native: Any) -> dict[str, Any]:
    class Device:
        """Makes a device current as long as it lasts."""

        def __init__(self, device: Any) -> None:
            self._to = _index(native, device)
            self._from = 0

        def __enter__(self) -> None:
            self._from = native.current_device()
            native.set_device(self._to)

        def __exit__(self, *_: object) -> None:
            native.set_device(self._from)

    return {
        "is_available": lambda: native.device_count() > 0,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: int(native.device_count()),
        "current_device": lambda: int(native.current_device()),
        "set_device": lambda device: native.set_device(_index(native, device)),
        "synchronize": lambda device=None: None,  # noqa: ARG005
        "device": Device,
    }


def _memory(native: Any) -> dict[str, Any]:
    def read(name: str) -> Callable[..., int]:
        return lambda device=None: native.memory(_index(native, device))[name]

    def reset_peak(device: Any = None) -> None:
        native.reset_peak(_index(native, device))

    def free_and_total(device: Any = None) -> tuple[int, int]:
        found = native.memory(_index(native, device))
        return found["capacity"] - found["used"], found["capacity"]

    def stats(device: Any = None) -> dict[str, int]:
        found = native.memory(_index(native, device))
        return {
            "allocated_bytes.all.current": found["used"],
            "allocated_bytes.all.peak": found["peak"],
            "num_ooms": found["refused"],
        }

    return {
        "memory_allocated": read("used"),
        "max_memory_allocated": read("peak"),
        "memory_reserved": read("used"),
        "max_memory_reserved": read("peak"),
        "reset_peak_memory_stats": reset_peak,
        "reset_max_memory_allocated": reset_peak,
        "mem_get_info": free_and_total,
        "memory_stats": stats,
        "memory_summary": lambda device=None, abbreviated=False: str(stats(device)),  # noqa: ARG005
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "OutOfMemoryError": torch.OutOfMemoryError,
    }


def _random(native: Any) -> dict[str, Any]:
    def generator(device: Any = None) -> torch.Generator:
        found: torch.Generator = native.default_generator(_index(native, device))
        return found

    def seed_all(seed: int) -> None:
        for index in range(native.device_count()):
            generator(index).manual_seed(int(seed))

    return {
        "manual_seed": lambda seed: generator().manual_seed(int(seed)),
        "manual_seed_all": seed_all,
        "seed": lambda: generator().seed(),
        "initial_seed": lambda: generator().initial_seed(),
        "get_rng_state": lambda device="npu": generator(device).get_state(),
        "set_rng_state": lambda state, device="npu": generator(device).set_state(state),
    }


def _chip(native: Any, chip: Callable[[], Chip]) -> dict[str, Any]:
    def name(device: Any = None) -> str:  # noqa: ARG001
        return f"Ascend{chip().name} (simulated)"

    def properties(device: Any = None) -> Any:
        total = native.memory(_index(native, device))["capacity"]
        return types.SimpleNamespace(
            name=name(), total_memory=total, cube_core_num=0, vector_core_num=0, L2_cache_size=0
        )

    def dtypes() -> list[torch.dtype]:
        return [torch.float16, *([torch.bfloat16] if chip().bfloat16 else [])]

    return {
        "get_device_name": name,
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: None,  # noqa: ARG005
        "get_soc_version": lambda: _SOC_VERSIONS.get(chip().name, -1),
        "is_bf16_supported": lambda: chip().bfloat16,
        "get_amp_supported_dtype": dtypes,
        "set_compile_mode": lambda jit_compile=False: None,  # noqa: ARG005
        "config": types.SimpleNamespace(allow_internal_format=False),
        "matmul": types.SimpleNamespace(allow_hf32=False),
        "conv": types.SimpleNamespace(allow_hf32=True),
    }


def _streams(native: Any) -> dict[str, Any]:
    """Hand out torch's own streams and events: torch 2.13 refuses subclasses of them."""

    def here(device: Any = None) -> torch.device:
        return torch.device("npu", _index(native, device))

    class Kind(type):
        """Lets isinstance work for what is no class of its own."""

        base: type

        def __instancecheck__(cls, one: object) -> bool:
            return isinstance(one, cls.base) and getattr(one, "device", here()).type == "npu"

    class Stream(metaclass=Kind):
        base = torch.Stream

        def __new__(cls, device: Any = None, priority: int = 0, **_: Any) -> Any:
            return torch.Stream(here(device), priority=priority)

    class Event(metaclass=Kind):
        base = torch.Event

        def __new__(cls, enable_timing: bool = False, **_: Any) -> Any:  # noqa: FBT001, FBT002
            return torch.Event("npu", enable_timing=enable_timing)

    class OnStream:
        """All streams are one here."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            """Nothing to change."""

        def __exit__(self, *_: object) -> None:
            """Nothing to change back."""

    def current(device: Any = None) -> Any:
        return torch.Stream(here(device))

    return {
        "Stream": Stream,
        "Event": Event,
        "stream": OnStream,
        "current_stream": current,
        "default_stream": current,
    }
