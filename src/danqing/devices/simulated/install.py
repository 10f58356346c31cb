"""Puts the simulated device into this process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.devices.ascend_chips import CHIPS, Chip, chip_named
from danqing.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

_HERE = Path(__file__).parent
RESERVED_GIB = 3.0
"""What an idle card has taken, about: of 64 GiB, 60.96 can be allocated."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What was put in.

    Attributes:
        chip: which one is simulated.
        devices: how many.
        memory_gib: each can allocate.
        native: the compiled module.
    """

    chip: Chip
    devices: int
    memory_gib: float
    native: ModuleType


_INSTALLED: list[Simulation] = []


def install(
    chip: str = "910B3", *, devices: int = 1, memory_gib: float | None = None
) -> Simulation:
    """Give torch an `npu` device, and Python a `torch_npu`; again, change the chip.

    Args:
        chip: a name of `danqing.devices.ascend_chips`.
        devices: how many there are.
        memory_gib: what each can allocate; the chip's memory less what an idle card has taken.

    Raises:
        RequestError: the chip is unknown, or the real torch_npu is loaded.
        InstallationError: the device cannot be compiled.
    """
    found = chip_named(chip)
    if found is None:
        known = ", ".join(one.name for one in CHIPS)
        raise RequestError("unknown chip", seen=chip, allowed=known)
    room = memory_gib if memory_gib is not None else found.memory_gib - RESERVED_GIB
    native = _INSTALLED[0].native if _INSTALLED else _put_in()
    native.set_devices(devices, int(room * 2**30))
    _set_refusals(native, found)
    _INSTALLED[:] = [Simulation(chip=found, devices=devices, memory_gib=room, native=native)]
    return _INSTALLED[0]


def installed() -> Simulation | None:
    """Return the simulation of this process, if there is one."""
    return _INSTALLED[0] if _INSTALLED else None


def _put_in() -> ModuleType:
    import torch

    from danqing.devices.simulated import build, operators, runtime

    if getattr(torch, "npu", None) is not None:
        raise RequestError(
            "this process has a real torch_npu already", seen="torch.npu", allowed="a fresh process"
        )
    native = build.load()
    torch.utils.rename_privateuse1_backend("npu")
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    module = runtime.make_module(native, lambda: _INSTALLED[0].chip)
    torch._register_device_module("npu", module)  # noqa: SLF001 - torch's own way for backends
    sys.modules["torch.npu"] = module
    native.pass_autograd()
    native.register_whole(read_names("whole.txt"))
    native.set_registered(registered_operators())
    operators.make_torch_npu(native, module)
    return native


def read_names(file: str) -> list[str]:
    """Read a list of operators' names that lies beside this module."""
    lines = (_HERE / file).read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def registered_operators() -> list[str]:
    """Return the operators torch_npu registers: of the wheel that is installed, else of 2.13.0."""
    return _of_the_wheel() or read_names("registered.txt")


def _of_the_wheel() -> list[str]:
    """Read names from the table inside an installed torch_npu, without importing it."""
    import importlib.util

    spec = importlib.util.find_spec("torch_npu") if "torch_npu" not in sys.modules else None
    for place in (spec.submodule_search_locations or []) if spec else []:
        table = Path(place) / "csrc" / "aten" / "npu_native_functions_by_codegen.yaml"
        if table.is_file():
            return sorted(set(_names_in(table.read_text("utf-8").splitlines())))
    return []


def _names_in(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        bare = line.strip().removeprefix("- ").removeprefix("func: ").strip()
        name = bare.split("(")[0].strip("'\" ")
        if name and not name.endswith(":") and all(part.isidentifier() for part in name.split(".")):
            yield name


def _set_refusals(native: Any, chip: Chip) -> None:
    """Tell the device which dtypes the chip's kernels do not take.

    Copies are let through everywhere, as torch_npu does; it is the kernel that refuses.
    """
    import torch

    wide = [torch.float64, torch.complex64, torch.complex128]
    small = [
        getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)
    ]
    native.allow_all()
    native.refuse([*small, *([] if chip.bfloat16 else [torch.bfloat16])])
    for names, dtypes in _REFUSED_BY.items():
        for name in names:
            native.refuse_in(f"aten::{name}", wide if dtypes == "wide" else [torch.float64])


_REFUSED_BY: dict[tuple[str, ...], str] = {
    # https://github.com/huggingface/diffusers/issues/10428 (float64), #12979, #13689 (complex)
    ("repeat_interleave", "mm", "addmm", "bmm", "convolution", "index.Tensor"): "wide",
    (
        "native_layer_norm", "native_group_norm", "_softmax", "scaled_dot_product_attention",
        "gelu", "silu",
    ): "double",
}  # fmt: skip
"""Operators by what they refuse beside the chip's own: read from issues, 2026-11-21, not from
hardware."""
