"""What will happen, decided before it does: device, dtypes, placement, bytes, and the reasons."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from danqing.devices import OWN_ATTENTION
from danqing.errors import DoesNotFitError, DtypeError, KernelError, RequestError
from danqing.quantities import size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from danqing.devices import Device, Memory, Selection
    from danqing.models.base import Model

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes a model can compute in, and their bytes."""
ATTENTION = {
    "auto": "torch's scaled_dot_product_attention, the kernel it prefers",
    "math": "torch's scaled_dot_product_attention, matrix products and a softmax",
    "flash": "torch's scaled_dot_product_attention, flash",
    "efficient": "torch's scaled_dot_product_attention, memory efficient",
    "cudnn": "torch's scaled_dot_product_attention, cuDNN",
    **OWN_ATTENTION,
}
"""Kernels of attention, by the names they are asked for."""
GIB = 2**30
RESERVE = 0.1
"""Share of the free memory that is left for activations; the plan counts weights only."""

Placement = Literal["resident", "staged"]
"""`resident`: everything stays on the device. `staged`: each stage's components are read when it
begins and dropped when it ends, for every picture."""


@dataclass(frozen=True, kw_only=True)
class PlannedComponent:
    """One component's part of the plan.

    `mapped` weights are used where they lie on disk; their memory is the system's page cache.
    `device` is named where it is not the plan's.
    """

    name: str
    stored: str
    dtype: str
    bytes: int
    mapped: bool
    reason: str
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The decisions and their reasons; the engine follows it to the letter."""

    title: str
    layout: str
    path: str
    device: str
    chip: str
    device_reason: str
    dtype: str
    dtype_reason: str
    attention: str
    attention_reason: str
    deterministic: bool
    compiled: str
    fused: tuple[str, ...]
    placement: Placement
    placement_reason: str
    components: tuple[PlannedComponent, ...]
    assumptions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the plan as labelled lines for people."""
        yield "model", f"{self.title}, {self.layout}, {self.path}"
        yield "device", f"{self.device} ({self.chip}); {self.device_reason}"
        yield "dtype", f"{self.dtype}: {self.dtype_reason}"
        yield "attention", f"{self.attention}: {self.attention_reason}"
        if self.deterministic:
            yield "kernels", "deterministic ones only"
        if self.fused:
            yield "fused", ", ".join(self.fused)
        if self.compiled != "off":
            yield "compile", f"the transformer's blocks, with {self.compiled}, at the first step"
        yield "placement", f"{self.placement}: {self.placement_reason}"
        for part in self.components:
            how = "mapped from disk" if part.mapped else "in memory"
            reason = f"; {part.reason}" if part.reason else ""
            where = f" on {part.device}" if part.device else ""
            yield f"  {part.name}", f"{size(part.bytes)} {part.dtype}, {how}{where}{reason}"
        for text in self.assumptions:
            yield "assumed", text


def make_plan(
    model: Model,
    selection: Selection,
    dtype: str,
    placement: str = "auto",
    *,
    attention: str = "auto",
    deterministic: bool = False,
    compile_with: str = "off",
    fused: str = "off",
    places: Mapping[str, Device] = {},
) -> Plan:
    """Decide how a model runs on a device.

    Args:
        model: with its checkpoint; its stages say which components are needed together.
        selection: the device.
        dtype: `auto`, or one of `DTYPES`.
        placement: `auto`, `resident` or `staged`.
        attention: `auto`, or one of torch's kernels.
        deterministic: only kernels that give the same bits again.
        compile_with: `off`, or a compiler of the device.
        fused: `off`, `all`, or names of the device's fused kernels with commas between.
        places: components that are elsewhere.

    Raises:
        RequestError: there is no such placement or attention.
        DtypeError: the device does not compute in this dtype.
        KernelError: the device has no such attention, compiler or fused kernel.
        DoesNotFitError: the weights do not fit, not even stage by stage.
    """
    device = selection.device
    chosen, why = _choose_dtype(model, device, dtype)
    components = tuple(_components(model, device, chosen, places))
    chosen_place, place_why = _place(components, model, device, placement)
    return Plan(
        title=model.spec.title,
        layout=model.checkpoint.layout,
        path=model.checkpoint.name or str(model.checkpoint.path),
        device=device.name,
        chip=device.chip,
        device_reason=selection.reason,
        dtype=chosen,
        dtype_reason=why,
        attention=attention,
        attention_reason=_attention(attention, device, chosen),
        deterministic=deterministic,
        compiled=_compiler(compile_with, device),
        fused=_fused(fused, device),
        placement=chosen_place,
        placement_reason=place_why,
        components=components,
        assumptions=model.assumptions(),
    )


def _compiler(asked: str, device: Device) -> str:
    if asked != "off":
        device.compiler(asked)
    return asked


def _fused(asked: str, device: Device) -> tuple[str, ...]:
    if asked == "off":
        return ()
    there = tuple(device.fused)
    names = there if asked == "all" else tuple(name.strip() for name in asked.split(","))
    if not names or not set(names) <= set(there):
        raise KernelError(
            f"{device.name} has no such fused kernel",
            seen=asked,
            allowed=", ".join(["off", *(["all", *there] if there else [])]),
        )
    return names


def _attention(asked: str, device: Device, dtype: str) -> str:
    """Check that the device has this kernel, and say what will run."""
    from danqing.models.kernels import has_attention

    if asked not in ATTENTION:
        raise RequestError("there is no such attention", seen=asked, allowed=", ".join(ATTENTION))
    if not has_attention(asked, device, dtype):
        raise KernelError(
            f"{device.name} has no such attention in {dtype}",
            seen=asked,
            allowed=", ".join(name for name in ATTENTION if has_attention(name, device, dtype)),
        )
    return ATTENTION[asked]


def _choose_dtype(model: Model, device: Device, dtype: str) -> tuple[str, str]:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise DtypeError(
                "there is no such dtype", seen=dtype, allowed=f"auto, {', '.join(DTYPES)}"
            )
        how = device.computes(dtype)
        if how == "no":
            able = [name for name in DTYPES if device.computes(name) != "no"]
            raise DtypeError(
                f"{device.name} ({device.chip}) does not compute in {dtype}",
                seen=dtype,
                allowed=", ".join(able),
            )
        return dtype, "asked for" + (
            ", though it is emulated here: slow" if how != "native" else ""
        )
    stored = model.checkpoint.component("transformer").dtype
    if stored in DTYPES and device.computes(stored) == "native":
        return stored, f"the transformer is stored so, and {device.name} computes in it"
    return _second_choice(stored, model, device)


def _second_choice(stored: str, model: Model, device: Device) -> tuple[str, str]:
    """Choose when the stored dtype is none the device computes in: a wider one if it fits."""
    because = f"stored in {stored}, which {device.name} does not compute natively"
    wide = sum(part.bytes for part in _components(model, device, "float32"))
    memory = device.memory()
    if device.shares_host_memory():
        if memory is None or wide < memory.free_bytes * (1 - RESERVE):
            return "float32", f"{because}; float32 loses nothing and fits"
        if stored in DTYPES and device.computes(stored) != "no":
            return stored, f"{because}, but float32 ({size(wide)}) does not fit; emulated, slow"
    for name in ("bfloat16", "float16", "float32"):
        if device.computes(name) == "native":
            return name, because
    return "float32", because


def _components(
    model: Model, device: Device, dtype: str, places: Mapping[str, Device] = {}
) -> Iterator[PlannedComponent]:
    dtypes = model.dtypes(dtype)
    for name in places:
        if name not in dtypes:
            raise RequestError(
                "there is no such component to place", seen=name, allowed=", ".join(dtypes)
            )
    for name, (wanted, reason) in dtypes.items():
        place = places.get(name, device)
        if place.computes(wanted) == "no":
            raise DtypeError(
                f"{place.name} ({place.chip}) does not compute in {wanted}", seen=f"{name} on it"
            )
        part = model.checkpoint.component(name)
        elements = sum(math.prod(entry.shape) for entry in part.entries.values())
        yield PlannedComponent(
            name=name,
            stored=part.dtype,
            dtype=wanted,
            bytes=elements * DTYPES[wanted],
            mapped=place.shares_host_memory() and part.dtype == wanted != "float32",
            reason=reason,
            device=place.name if place.name != device.name else "",
        )


def _place(
    components: tuple[PlannedComponent, ...], model: Model, device: Device, asked: str
) -> tuple[Placement, str]:
    """Keep everything on the device if it fits, else one stage at a time, else refuse."""
    if asked not in ("auto", "resident", "staged"):
        raise RequestError(
            "there is no such placement", seen=asked, allowed="auto, resident, staged"
        )
    memory = device.memory()
    taken = {part.name: 0 if part.mapped or part.device else part.bytes for part in components}
    total = sum(taken.values())
    stages = {stage: sum(taken[name] for name in names) for stage, names in model.stages.items()}
    largest = max(stages, key=lambda stage: stages[stage])
    in_stages = f"the largest stage, {largest}, takes {size(stages[largest])}"
    if memory is None:
        where: Placement = "staged" if asked == "staged" else "resident"
        taken_then = in_stages if asked == "staged" else f"{size(total)} of weights"
        return where, f"{taken_then}; the device does not say what is free"
    usable = int(memory.free_bytes * (1 - RESERVE))
    free = f"{size(memory.free_bytes)} free, a tenth of it kept for activations"
    mapped = sum(part.bytes for part in components if part.mapped)
    if total <= usable and asked != "staged":
        return "resident", _in_words(total, mapped, memory, free)
    if stages[largest] <= usable and asked != "resident":
        if asked == "staged":
            return "staged", f"asked for; {in_stages} ({free})"
        return "staged", f"{size(total)} of weights do not fit ({free}); {in_stages}"
    needed = total if asked == "resident" else stages[largest]
    raise DoesNotFitError(
        f"the weights do not fit on {device.name}",
        seen=f"{size(needed)} for " + ("all" if asked == "resident" else f"the stage {largest}"),
        allowed=f"{size(usable)} ({free})",
        hint="a smaller dtype, "
        + ("--placement staged, " if asked == "resident" else "")
        + "or a device with more memory",
    )


def _in_words(taken: int, mapped: int, memory: Memory, free: str) -> str:
    text = f"{size(taken)} of weights in memory, {free}"
    if not mapped:
        return text
    text += f"; {size(mapped)} mapped from disk"
    if taken + mapped > memory.free_bytes:
        text += ", more than is free: parts of it are read again in every step"
    return text
