"""Devices: the only package that names accelerators; the rest of danqing is device-blind.

To add a family: one file with a `Device` subclass, and one row in `FAMILIES`.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from danqing.devices.base import Availability, Computes, Device, Memory
from danqing.errors import DeviceUnavailableError, InstallationError, UnknownDeviceError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "BACKENDS",
    "FAMILIES",
    "OWN_ATTENTION",
    "Availability",
    "Computes",
    "Device",
    "Memory",
    "Selection",
    "availability",
    "import_torch",
    "select",
]

FAMILIES = {
    "cuda": "danqing.devices.cuda:Cuda",
    "npu": "danqing.devices.ascend:Ascend",
    "xpu": "danqing.devices.xpu:Xpu",
    "mps": "danqing.devices.mps:Mps",
    "cpu": "danqing.devices.cpu:Cpu",
}
"""Where each family lives, in the order in which `auto` prefers them."""

BACKENDS = {"npu": "torch_npu"}
"""Families that torch itself does not have, and the library that brings each; none is needed."""

OWN_ATTENTION = {
    "npu": "torch_npu's npu_fusion_attention, where it takes the mask",
    "mindie": "MindIE-SD's attention, where there is no mask",
    "native": "danqing's own kernel in bfloat16 for CPUs without AMX, where there is no mask",
}
"""Kernels of attention that only some families have, and what each is."""

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_NAME = re.compile(r"(?P<family>[a-z]+)(:(?P<index>\d{1,4}))?")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The device chosen, and why."""

    device: Device
    reason: str


def import_torch() -> ModuleType:
    """Import torch without letting an installed but broken backend break it.

    torch loads every installed backend while it is imported, unless told not to; then a torch_npu
    without CANN makes `import torch` fail. danqing loads the backend itself when it is wanted.

    Raises:
        InstallationError: torch is not there, or cannot be loaded.
    """
    asked = os.environ.get(_AUTOLOAD)
    if "torch" not in sys.modules:
        os.environ.setdefault(_AUTOLOAD, "0")
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise InstallationError(
            "torch cannot be imported",
            seen=lines[0],
            hint="danqing doctor shows what is installed",
        ) from error
    finally:
        if asked is None:
            os.environ.pop(_AUTOLOAD, None)


def _class(family: str) -> type[Device]:
    module, _, name = FAMILIES[family].partition(":")
    found: type[Device] = getattr(importlib.import_module(module), name)
    return found


@cache
def availability(family: str) -> Availability:
    """Look whether a family can be used here; never raises for a known family."""
    import_torch()
    return _class(family).availability()


def select(name: str) -> Selection:
    """Return the device of this name; `auto` takes the best one present.

    Raises:
        UnknownDeviceError: no device is called so.
        DeviceUnavailableError: it is not here; the message says why.
    """
    name = name.strip().lower()
    if name == "auto":
        return _best()
    match = _NAME.fullmatch(name)
    if match is None or match["family"] not in FAMILIES:
        raise UnknownDeviceError(
            "unknown device",
            seen=name,
            allowed="auto, cpu, "
            + ", ".join(f"{family}[:i]" for family in FAMILIES if family != "cpu"),
        )
    family, index = match["family"], int(match["index"] or 0)
    found = availability(family)
    if not found.count:
        raise DeviceUnavailableError(
            f"{family} is not available: {found.reason}",
            seen=name,
            hint=f"{found.hint}; 'danqing doctor' shows every device" if found.hint else None,
        )
    if index >= found.count:
        raise DeviceUnavailableError(
            f"there is no {family} device with this number",
            seen=name,
            allowed=", ".join(f"{family}:{i}" for i in range(found.count)),
        )
    return _take(family, index, "asked for")


def _take(family: str, index: int, reason: str) -> Selection:
    for other in FAMILIES:
        if other != family:
            _class(other).put_aside()
    return Selection(device=_class(family)(index), reason=reason)


def _best() -> Selection:
    passed_over: list[str] = []
    for family in FAMILIES:
        found = availability(family)
        if found.count:
            why = f"auto: the best one here ({', '.join(passed_over)})" if passed_over else "auto"
            return _take(family, 0, why)
        passed_over.append(f"no {family}" + (f": {found.reason}" if found.expected else ""))
    raise DeviceUnavailableError("no device can be used", hint="danqing doctor")
