"""What will happen, decided before it does: device, dtypes, placement, bytes, and the reasons."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from danqing.devices import OWN_ATTENTION
from danqing.errors import DoesNotFitError, DtypeError, KernelError, RequestError
from danqing.plan import budget
from danqing.plan.budget import Arrangement, Block, Part, Placement, Work
from danqing.plan.rates import measured
from danqing.quantities import size
from danqing.request import Request, check_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from danqing.devices import Device, Selection
    from danqing.models.model import Model
    from danqing.options import Options
    from danqing.plan.rates import Rates
    from danqing.request import Resolved

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes a model can compute in, and their bytes."""
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
GIB = 2**30
RESERVE = 0.1
"""Share of the free memory that is left alone, unless a limit is given."""
OVERHEAD = 1.3
"""A stage's seconds for each second of its matrix products at the measured rate."""
_WORTH_MEASURING = 1 << 30
"""Bytes of weights; for fewer the machine's rates are not measured."""


@dataclass(frozen=True, kw_only=True)
class PlannedComponent:
    """One component's part of the plan.

    Attributes:
        name: of the component.
        stored: dtype of the files.
        dtype: what it computes in.
        bytes: of its weights in this dtype.
        mapped: they are used where they lie on disk; their memory is the system's page cache.
        reason: of the dtype, where it is not the plan's.
        device: where it is not the plan's.
        placement: `resident`, `staged` or `streamed`.
        blocks: that are streamed, or stay while others are streamed.
        staying: names of those that stay.
        arithmetic: `int8` if its blocks compute with bytes, else empty.
        compact: those that stay do so as they are stored, and are widened when they compute.
    """

    name: str
    stored: str
    dtype: str
    bytes: int
    mapped: bool
    reason: str
    device: str = ""
    placement: Placement = "resident"
    blocks: int = 0
    staying: tuple[str, ...] = ()
    arithmetic: str = ""
    compact: bool = False


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
    kept: tuple[str, ...]
    ring_bytes: int
    tile: int
    limit_bytes: int | None
    limit_reason: str
    picture: str
    activation_bytes: Mapping[str, int]
    peak_bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    assumptions: tuple[str, ...]

    @property
    def predicted_peak_bytes(self) -> int:
        """Memory of the worst stage."""
        return max(self.peak_bytes.values())

    def followed(self, options: Options) -> Options:
        """Return the options with the choices made for them that can change the image's bits."""
        return options.replace(
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            fused=",".join(self.fused) or "off",
            tile=str(self.tile or "off"),
        )

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
            if part.placement == "streamed":
                how = f"streamed, {len(part.staying)} of {part.blocks} blocks stay"
                how += f" in {part.arithmetic} and compute so" if part.arithmetic else ""
                how += " as they are stored" if part.compact and part.staying else ""
            reason = f"; {part.reason}" if part.reason else ""
            where = f" on {part.device}" if part.device else ""
            yield f"  {part.name}", f"{size(part.bytes)} {part.dtype}, {how}{where}{reason}"
        if self.tile:
            yield "tiles", f"of {self.tile} pixels, for decoding whole would not fit, or as asked"
        yield "memory", f"{size(self.predicted_peak_bytes)} at the most, for {self.picture}"
        if self.seconds:
            stages = ", ".join(f"{name} {_time(value)}" for name, value in self.seconds.items())
            yield "time", f"{_time(sum(self.seconds.values()))} expected: {stages}"
        for text in self.assumptions:
            yield "assumed", text


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
        KernelError: the device has no such attention, compiler or fused kernel.
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
    if request is None:
        request = model.spec.resolve(Request(prompt="a"))
    latents = tuple(int(side) for side in model.draw(request, 0)[0].shape[-2:])
    per = request.height // latents[0]
    sides = _sides(options.tile, latents, per)
    work = _work(model, device, request, images, components, latents, sides)
    _check_quantize(options, device)
    fitting = _Fitting(
        model,
        device,
        components,
        work,
        dtype=chosen,
        memory=options.memory,
        tiles="may" if options.tile == "auto" else "must",
        int8=options.quantize == "int8",
    )
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
        tile=arranged.tile * per,
        limit_bytes=fitting.limit,
        limit_reason=fitting.limit_reason,
        picture=_in_words(request, images),
        activation_bytes=dict(work.activations),
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
            f"{device.name} has no such fused kernel",
            seen=asked,
            allowed=", ".join(["auto", "off", *(["all", *there] if there else [])]),
        )
    return names


def _attention(asked: str, device: Device, dtype: str) -> str:
    """Check that the device has this kernel, and say what will run."""
    from danqing.networks.kernels import has_attention

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


# --- memory --------------------------------------------------------------------------------------


def _work(  # noqa: PLR0917
    model: Model,
    device: Device,
    request: Resolved,
    pictures: int,
    components: tuple[PlannedComponent, ...],
    latents: tuple[int, ...],
    sides: Sequence[int],
) -> Work:
    sizes = {part.name: DTYPES[part.dtype] for part in components}
    activations = model.activations(request, pictures, sizes)
    flops = model.flops(request, pictures)
    rounds = -(-request.num_images_per_prompt // pictures)
    height, width = latents
    joined = 4 * 4 * request.height * request.width * pictures
    return Work(
        stages={stage: model.needs(stage, request) for stage in model.stages},
        activations=activations,
        flops={**flops, "decode": rounds * flops["decode"]},
        steps=rounds * request.num_inference_steps,
        base=device.base_bytes(),
        tiles={
            side: activations["decode"] * min(side, height) * min(side, width) // (height * width)
            + joined
            for side in sides
        },
    )


def _sides(asked: str, latents: tuple[int, ...], per: int) -> list[int]:
    """Return the sides of tiles that may be taken, in latents of `per` pixels."""
    if asked == "auto":
        return budget.tiles_of(*latents)
    if asked == "off":
        return []
    least = budget.SMALLEST_TILE * per
    if not asked.isdigit() or int(asked) < least:
        raise RequestError(
            "that is no tile", seen=asked, allowed=f"auto, off, or {least} and more pixels"
        )
    return [int(asked) // per]


class _Fitting:
    """Finds the arrangement for a limit."""

    def __init__(
        self,
        model: Model,
        device: Device,
        components: tuple[PlannedComponent, ...],
        work: Work,
        *,
        dtype: str,
        memory: int | None,
        tiles: Literal["may", "must"],
        int8: bool,
    ) -> None:
        self._model = model
        self._device = device
        self._work = work
        self._dtype = dtype
        self._tiles = tiles
        self._int8 = int8
        self.parts = {part.name: self._part(part) for part in components}
        self.limit, self.limit_reason = self._limit(memory)

    def _limit(self, memory: int | None) -> tuple[int | None, str]:
        if memory is not None:
            return memory, "asked for"
        found = self._device.memory()
        if found is None:
            return None, "the device does not say what is free"
        free = found.free_bytes + self._work.base  # the process's own is taken already
        return int(free * (1 - RESERVE)), f"{size(free)} free, less a tenth"

    def _part(self, component: PlannedComponent) -> Part:
        if component.device:
            return Part(name=component.name, disk=0, bytes=0)
        recoded = self._int8 and component.name == "transformer"
        itemsize = DTYPES[component.dtype]
        shared = self._device.shares_host_memory()
        units = [] if component.name == "vae" else self._model.units(component.name)
        smaller = sum(disk for _, disk in units) < sum(u.elements for u, _ in units) * itemsize
        compact = shared and smaller and not recoded
        widened = component.stored != component.dtype or component.dtype == "float32"
        as_bytes = recoded and component.stored.startswith("I8")  # these compute as they lie
        blocks = tuple(
            Block(
                name=unit.name,
                disk=disk,
                bytes=unit.elements * itemsize,
                wide=unit.elements * itemsize * (widened and (unit.once or not as_bytes)),
                stays=unit.elements if recoded else disk if compact else unit.elements * itemsize,
                once=unit.once,
            )
            for unit, disk in units
        )
        on_disk = self._model.checkpoint.component(component.name).size_bytes
        copied = shared and component.stored != component.dtype
        return Part(
            name=component.name,
            disk=on_disk,
            bytes=self._model.elements(component.name) * itemsize,
            blocks=blocks,
            extra=on_disk if copied else 0,
            mapped=component.mapped,
            tables=self._model.table_elements(component.name) * itemsize if component.mapped else 0,
            recoded=recoded,
            compact=compact,
        )

    @cached_property
    def _rates(self) -> Rates | None:
        """The machine's rates, where there is enough to do that they matter."""
        if sum(part.bytes for part in self.parts.values()) < _WORTH_MEASURING:
            return None
        transformer = self._model.checkpoint.component("transformer")
        file = max(transformer.files, key=lambda path: path.stat().st_size)
        return measured(self._device, self._dtype, file)

    def choose(self, asked: str) -> tuple[Arrangement, str]:
        """Return the first arrangement that fits, of those asked for, and why it is that one.

        Raises:
            RequestError: nothing can be streamed.
            DoesNotFitError: none fits; it says what would.
        """
        limit = math.inf if self.limit is None else self.limit
        tried: list[Arrangement] = []
        for found in self._arrangements(asked):
            for one in self._tilings(found, limit):
                if one.peak <= limit:
                    return one, self._reason(one, asked, tried)
                tried.append(one)
        if not tried:
            raise self._nothing_to_stream(asked)
        raise self._too_large(tried, asked)

    def _tilings(self, found: Arrangement, limit: float) -> Iterator[Arrangement]:
        """Yield an arrangement, and with tiles if only decoding is too large, or as asked."""
        if self._tiles == "may" or not self._work.tiles:
            yield found
        others = [peak for stage, peak in found.peaks.items() if stage != "decode"]
        if self._tiles == "must" or max(others) <= limit:
            yield from budget.tiled(found, self._work)

    def _arrangements(self, asked: str) -> Iterator[Arrangement]:
        parts, work = self.parts, self._work
        limit = sys.maxsize if self.limit is None else self.limit
        if asked in ("auto", "resident") and not self._int8:
            yield budget.resident(parts, work)
        if asked in ("auto", "staged") and not self._int8:
            yield budget.staged(parts, work, limit if asked == "auto" else 0)
        if asked in ("auto", "streamed"):
            rates = self._rates if self._device.shares_host_memory() else None
            every = asked == "streamed"
            yield from budget.streamings(parts, work, limit, rates, all_of_it=every)

    def _reason(self, found: Arrangement, asked: str, tried: Sequence[Arrangement]) -> str:
        limit = "" if self.limit is None else f", {size(self.limit)} allowed ({self.limit_reason})"
        text = f"{size(found.peak)} at the most, in {found.worst}{limit}"
        if asked != "auto":
            return f"asked for; {text}"
        if tried:
            text += f"; {tried[0].placement} would take {size(tried[0].peak)}"
        if self.limit is None:
            text += f"; {self.limit_reason}"
        return text

    def _nothing_to_stream(self, asked: str) -> RequestError:
        if self._int8 and asked not in ("auto", "streamed"):
            return RequestError(
                "--quantize int8 needs streamed blocks: they are quantized as they are read",
                seen=f"--placement {asked}",
                allowed="auto, streamed",
                hint="leave out --placement: blocks that fit in memory stay there",
            )
        asked = "--quantize int8" if self._int8 else f"--placement {asked}"
        return RequestError("no block of this model is large enough to be streamed", seen=asked)

    def _too_large(self, tried: Sequence[Arrangement], asked: str) -> DoesNotFitError:
        least = min(tried, key=lambda found: found.peak)
        fits = [
            found
            for found in self._arrangements("auto")
            if found.placement != asked and found.peak <= (self.limit or 0)
        ]
        hint = (
            f"--placement {fits[0].placement} would take {size(fits[0].peak)}"
            if fits
            else f"--memory {least.peak / GIB + 0.05:.1f}GiB would do; or a smaller picture"
        )
        return DoesNotFitError(
            f"it does not fit on {self._device.name}",
            seen=f"{size(least.peak)} in {least.worst}, {least.placement}",
            allowed=f"{size(self.limit or 0)} ({self.limit_reason})",
            hint=hint,
        )

    def placed(self, part: PlannedComponent, found: Arrangement) -> PlannedComponent:
        """Return a component's part of the plan with its place."""
        if part.name not in found.streamed:
            place: Placement = "resident" if part.name in found.kept else "staged"
            mapped = part.mapped and found.placement != "streamed"  # then all is read
            return dataclasses.replace(part, placement=place, mapped=mapped)
        blocks = [block for block in self.parts[part.name].blocks if not block.once]
        return dataclasses.replace(
            part,
            mapped=False,
            placement="streamed",
            blocks=len(blocks),
            staying=found.streamed[part.name],
            arithmetic="int8" if self.parts[part.name].recoded else "",
            compact=self.parts[part.name].compact,
        )

    def seconds(self, found: Arrangement) -> dict[str, float]:
        """Estimate the seconds of each stage, reading included; nothing for small models."""
        rates = self._rates
        if rates is None:
            return {}
        seconds = {}
        for stage, names in self._work.stages.items():
            rate = rates.conv_flops if stage == "decode" else rates.matmul_flops
            computing = OVERHEAD * self._work.flops[stage] / rate
            if stage == "denoise":
                seconds[stage] = self._denoising(found, computing, rates)
            else:
                reading = sum(self.parts[name].disk for name in names) / rates.read_bytes
                streamed = any(name in found.streamed for name in names)
                seconds[stage] = max(computing, reading) if streamed else computing + reading
        return seconds

    def _denoising(self, found: Arrangement, computing: float, rates: Rates) -> float:
        part = self.parts["transformer"]
        once = sum(block.disk for block in part.blocks if block.once)
        if part.name not in found.streamed:
            return part.disk / rates.read_bytes + self._work.steps * computing
        cost = budget.READ_COST
        if part.recoded:
            computing /= budget.INT8_SPEED
            cost += budget.RECODE_COST
        staying = set(found.streamed[part.name])
        stay = sum(block.disk for block in part.blocks if block.name in staying)
        coming = sum(block.disk for block in part.blocks) - once - stay
        later = max(computing + coming * cost, coming / rates.read_bytes)
        # in the first step the layers that are needed once, and what stays, are read as well
        first = max(computing + (coming + once) * cost, (coming + once + stay) / rates.read_bytes)
        return stay / rates.fill_bytes + first + (self._work.steps - 1) * later


def _in_words(request: Resolved, pictures: int) -> str:
    steps = f"{request.num_inference_steps} steps"
    together = f", {pictures} pictures together" if pictures > 1 else ""
    return f"{request.height}x{request.width} in {steps}{together}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"  # noqa: PLR2004
