"""What will happen, decided before it does: device, dtypes, placement, bytes, and the reasons."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from danqing.devices import OWN_ATTENTION
from danqing.errors import DtypeError, KernelError, RequestError
from danqing.plan.fitting import RESERVE, Fitting, Task
from danqing.plan.plan import DTYPES, Plan, PlannedComponent
from danqing.plan.words import describe_work
from danqing.quantities import size
from danqing.request import Request, check_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from danqing.devices import Device, Selection
    from danqing.models.model import Model
    from danqing.options import Options
    from danqing.request import Resolved

ATTENTION = {
    "auto": "torch's scaled_dot_product_attention, the kernel it prefers",
    "torch": "torch's scaled_dot_product_attention, the kernel it prefers",
    "math": "torch's scaled_dot_product_attention, matrix products and a softmax",
    "flash": "torch's scaled_dot_product_attention, flash",
    "efficient": "torch's scaled_dot_product_attention, memory efficient",
    "cudnn": "torch's scaled_dot_product_attention, cuDNN",
    **OWN_ATTENTION,
}
"""Kernels of attention, by the names they are asked for."""


def make_plan(
    model: Model,
    selection: Selection,
    options: Options,
    *,
    places: Mapping[str, Device],
    request: Resolved | None = None,
    images: int = 1,
) -> Plan:
    """Decide how a model runs on a device.

    Args:
        model: with its checkpoint; its stages say which components are needed together.
        selection: the device.
        options: what was asked for.
        places: components that are elsewhere.
        request: what the memory is planned for; left out, an image of the model's default size.
        images: computed together.

    Raises:
        RequestError: unknown attention, invalid tile or batch size.
        DtypeError: the device does not compute in this dtype.
        KernelError: the device lacks this attention, compiler or fused kernel.
        DoesNotFitError: it does not fit, not even streamed.
    """
    check_batch(images)
    device = selection.device
    chosen, why = _choose_dtype(model, device, options.dtype)
    # a compiler fuses for itself, and cannot look into kernels that are not torch's
    preferred = device.preferred(chosen) if options.compile == "off" else ("auto", ())
    attention = preferred[0] if options.attention == "auto" else options.attention
    chosen_fused = preferred[1] if options.fused == "auto" else _fused(options.fused, device)
    components = tuple(_components(model, device, chosen, places))
    _check_quantize(options, device)
    task = Task(
        model=model,
        device=device,
        options=options,
        request=request or model.spec.resolve(Request(prompt="a")),
        images=images,
        dtype=chosen,
        components=components,
    )
    fitting = Fitting(task)
    arranged, place_why = fitting.choose(options.placement)
    if options.compile != "off" and arranged.streamed:
        raise KernelError(
            "what is streamed cannot be compiled: its weights come and go",
            seen=f"--compile {options.compile}, and {place_why}",
            hint="--compile off, or more memory",
        )
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
        deterministic=options.deterministic,
        compiled=_compiler(options.compile, device),
        fused=chosen_fused,
        placement=arranged.placement,
        placement_reason=place_why,
        components=tuple(fitting.placed(part, arranged) for part in components),
        kept=arranged.kept,
        ring_bytes=arranged.ring,
        tile=arranged.tile * task.pixels_per_latent,
        limit_bytes=fitting.limit,
        limit_reason=fitting.limit_reason,
        picture=describe_work(task.request, images),
        activation_bytes=dict(fitting.work.activations),
        peak_bytes=dict(arranged.peaks),
        seconds=fitting.seconds(arranged),
        assumptions=model.assumptions(),
    )


def _check_quantize(options: Options, device: Device) -> None:
    import torch

    if options.quantize == "int8" and device.int8_linear(torch.zeros(16, 16), None) is None:
        raise KernelError(
            f"{device.name} ({device.chip}) has no arithmetic in int8 that danqing knows",
            seen="--quantize int8",
            allowed="off",
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
            f"unknown fused kernel on {device.name}",
            seen=asked,
            allowed=", ".join(["auto", "off", *(["all", *there] if there else [])]),
        )
    return names


def _attention(asked: str, device: Device, dtype: str) -> str:
    """Check that the device has this kernel, and say what will run."""
    from danqing.networks.kernels import has_attention

    if asked not in ATTENTION:
        raise RequestError("unknown attention kernel", seen=asked, allowed=", ".join(ATTENTION))
    if not has_attention(asked, device, dtype):
        raise KernelError(
            f"{device.name} has no {asked} attention in {dtype}",
            seen=asked,
            allowed=", ".join(name for name in ATTENTION if has_attention(name, device, dtype)),
        )
    return ATTENTION[asked]


def _choose_dtype(model: Model, device: Device, dtype: str) -> tuple[str, str]:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise DtypeError("unknown dtype", seen=dtype, allowed=f"auto, {', '.join(DTYPES)}")
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
    denoiser = model.role("denoiser")[0]
    stored = model.checkpoint.component(denoiser).dtype
    if stored in DTYPES and device.computes(stored) == "native":
        return stored, f"the {denoiser} is stored so, and {device.name} computes in it"
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
            raise RequestError("unknown component in --place", seen=name, allowed=", ".join(dtypes))
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
