"""`python -m danqing.devices.survey`: every device family as one line of JSON.

It runs in a process of its own, because looking at a broken installation can end the process.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from danqing.devices import FAMILIES, availability, import_torch, select

if TYPE_CHECKING:
    from danqing.devices.base import Device

DTYPES = ("float32", "bfloat16", "float16")


def survey() -> dict[str, Any]:
    """Return torch's build and each family's devices, or why there are none."""
    torch = import_torch()
    found: dict[str, Any] = {}
    for family in FAMILIES:
        try:
            found[family] = _family(family)
        except Exception as error:  # noqa: BLE001 - a broken driver raises anything
            first = (str(error).splitlines() or [type(error).__name__])[0]
            found[family] = {"count": 0, "reason": f"failed while being looked at: {first}"}
    return {
        "torch": {"version": torch.__version__, "git": torch.version.git_version},
        "devices": found,
    }


def _family(family: str) -> dict[str, Any]:
    there = availability(family)
    devices = [
        _device(select(f"{family}:{index}" if family != "cpu" else family).device)
        for index in range(there.count)
    ]
    return {
        "count": there.count,
        "reason": there.reason,
        "hint": there.hint,
        "devices": devices,
    }


def _device(device: Device) -> dict[str, Any]:
    device.prepare()
    memory = device.memory()
    return {
        "name": device.name,
        "chip": device.chip,
        "driver": device.driver,
        "memory_bytes": memory.total_bytes if memory else None,
        "memory_free_bytes": memory.free_bytes if memory else None,
        "dtypes": {dtype: _computes(device, dtype) for dtype in DTYPES},
    }


def _computes(device: Device, dtype: str) -> str:
    """Say how the device claims to compute in a dtype, after it multiplied two matrices in it."""
    import torch

    claim = device.computes(dtype)
    if claim == "no":
        return claim
    try:
        ones = torch.ones(16, 16, dtype=getattr(torch, dtype), device=device.torch_device)
        product = float((ones @ ones).sum().item())
    except (RuntimeError, NotImplementedError) as error:
        return f"no ({str(error).splitlines()[0][:80]})"
    return claim if product == 16**3 else f"no (a matrix product gave {product}, not {16**3})"


if __name__ == "__main__":
    print(json.dumps(survey()))  # noqa: T201 - its output is its result
