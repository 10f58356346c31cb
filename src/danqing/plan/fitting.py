"""Finding the arrangement of the weights that fits, and how long a run in it would take."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from danqing.errors import DoesNotFitError, RequestError
from danqing.plan import budget
from danqing.plan.budget import Arrangement, Block, Part, Placement, Work
from danqing.plan.plan import DTYPES, PlannedComponent
from danqing.plan.rates import measured
from danqing.quantities import size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from danqing.devices import Device
    from danqing.models.model import Model
    from danqing.options import Options
    from danqing.plan.rates import Rates
    from danqing.request import Resolved

GIB = 2**30
RESERVE = 0.1
"""Share of the free memory that is left alone, unless a limit is given."""
OVERHEAD = 1.3
"""A stage's seconds for each second of its matrix products at the measured rate."""
_WORTH_MEASURING = 1 << 30
"""Bytes of weights; for fewer the machine's rates are not measured."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a plan is made for.

    Attributes:
        model: that runs.
        device: it runs on.
        options: what was asked for.
        request: the memory is planned for it.
        images: computed together.
        dtype: the model computes in.
        components: in their dtypes, not yet placed.
    """

    model: Model
    device: Device
    options: Options
    request: Resolved
    images: int
    dtype: str
    components: tuple[PlannedComponent, ...]

    @cached_property
    def latents(self) -> tuple[int, int]:
        """Height and width of the latents."""
        height, width = self.model.draw(self.request, 0)[0].shape[-2:]
        return int(height), int(width)

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of the side of a latent."""
        return self.request.height // self.latents[0]

    @property
    def int8(self) -> bool:
        """Whether denoisers compute in int8."""
        return self.options.quantize == "int8"

    def work(self) -> Work:
        """Return what memory and time depend on."""
        request, images = self.request, self.images
        sizes = {part.name: DTYPES[part.dtype] for part in self.components}
        activations = self.model.activations(request, images, sizes)
        flops = self.model.flops(request, images)
        rounds = -(-request.num_images_per_prompt // images)
        height, width = self.latents
        joined = 4 * 4 * request.height * request.width * images

        def decoding(side: int) -> int:
            share = min(side, height) * min(side, width)
            return activations["decode"] * share // (height * width) + joined

        return Work(
            stages={stage: self.model.needs(stage, request) for stage in self.model.stages},
            activations=activations,
            flops={**flops, "decode": rounds * flops["decode"]},
            steps=rounds * request.num_inference_steps,
            base=self.device.base_bytes(),
            tiles={side: decoding(side) for side in self._tile_sides()},
        )

    def _tile_sides(self) -> list[int]:
        """Return the sides of tiles that may be taken, in latents."""
        asked = self.options.tile
        if asked == "auto":
            return budget.tiles_of(*self.latents)
        if asked == "off":
            return []
        least = budget.SMALLEST_TILE * self.pixels_per_latent
        if not asked.isdigit() or int(asked) < least:
            raise RequestError(
                "invalid tile size", seen=asked, allowed=f"auto, off, or {least} and more pixels"
            )
        return [int(asked) // self.pixels_per_latent]


class Fitting:
    """Finds the arrangement for a limit.

    Attributes:
        work: what memory and time depend on.
        limit: bytes that the run may take; None where it is not known.
        limit_reason: why it is that.
    """

    def __init__(self, task: Task) -> None:
        """Count what each component takes."""
        self._task = task
        self._model = task.model
        self._device = task.device
        self.work = task.work()
        self._parts = {part.name: self._part(part) for part in task.components}
        self.limit, self.limit_reason = self._limit(task.options.memory)

    def _limit(self, memory: int | None) -> tuple[int | None, str]:
        if memory is not None:
            return memory, "asked for"
        found = self._device.memory()
        if found is None:
            return None, "the device does not say what is free"
        free = found.free_bytes + self.work.base  # the process's own is taken already
        return int(free * (1 - RESERVE)), f"{size(free)} free, less a tenth"

    def _part(self, component: PlannedComponent) -> Part:
        if component.device:
            return Part(name=component.name, disk=0, bytes=0)
        recoded = self._task.int8 and component.name in self._model.role("denoiser")
        itemsize = DTYPES[component.dtype]
        shared = self._device.shares_host_memory()
        decodes = component.name in self._model.role("decoder")
        units = [] if decodes else self._model.units(component.name)
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
        if sum(part.bytes for part in self._parts.values()) < _WORTH_MEASURING:
            return None
        denoisers = map(self._model.checkpoint.component, self._model.role("denoiser"))
        files = (path for part in denoisers for path in part.files)
        file = max(files, key=lambda path: path.stat().st_size)
        return measured(self._device, self._task.dtype, file)

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
        optional = self._task.options.tile == "auto"
        if optional or not self.work.tiles:
            yield found
        others = [peak for stage, peak in found.peaks.items() if stage != "decode"]
        if not optional or max(others) <= limit:
            yield from budget.tiled(found, self.work)

    def _arrangements(self, asked: str) -> Iterator[Arrangement]:
        parts, work = self._parts, self.work
        limit = sys.maxsize if self.limit is None else self.limit
        if asked in ("auto", "resident") and not self._task.int8:
            yield budget.resident(parts, work)
        if asked in ("auto", "staged") and not self._task.int8:
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
        if self._task.int8 and asked not in ("auto", "streamed"):
            return RequestError(
                "--quantize int8 needs streamed blocks: they are quantized as they are read",
                seen=f"--placement {asked}",
                allowed="auto, streamed",
                hint="leave out --placement: blocks that fit in memory stay there",
            )
        asked = "--quantize int8" if self._task.int8 else f"--placement {asked}"
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
        blocks = [block for block in self._parts[part.name].blocks if not block.once]
        return dataclasses.replace(
            part,
            mapped=False,
            placement="streamed",
            blocks=len(blocks),
            staying=found.streamed[part.name],
            arithmetic="int8" if self._parts[part.name].recoded else "",
            compact=self._parts[part.name].compact,
        )

    def seconds(self, found: Arrangement) -> dict[str, float]:
        """Estimate the seconds of each stage, reading included; nothing for small models."""
        rates = self._rates
        if rates is None:
            return {}
        seconds = {}
        for stage, names in self.work.stages.items():
            rate = rates.conv_flops if stage == "decode" else rates.matmul_flops
            computing = OVERHEAD * self.work.flops[stage] / rate
            if stage == "denoise":
                seconds[stage] = self._denoising(found, computing, rates)
            else:
                reading = sum(self._parts[name].disk for name in names) / rates.read_bytes
                streamed = any(name in found.streamed for name in names)
                seconds[stage] = max(computing, reading) if streamed else computing + reading
        return seconds

    def _denoising(self, found: Arrangement, computing: float, rates: Rates) -> float:
        """Estimate the seconds of all steps; each is taken to run all of the stage's networks."""
        parts = [self._parts[name] for name in self.work.stages["denoise"]]
        streamed = [part for part in parts if part.name in found.streamed]
        reading = sum(part.disk for part in parts if part not in streamed) / rates.read_bytes
        if not streamed:
            return reading + self.work.steps * computing
        blocks = [block for part in streamed for block in part.blocks]
        cost = budget.READ_COST
        if any(part.recoded for part in streamed):
            computing /= budget.INT8_SPEED
            cost += budget.RECODE_COST
        once = sum(block.disk for block in blocks if block.once)
        stay = sum(
            block.disk
            for part in streamed
            for block in part.blocks
            if block.name in found.streamed[part.name]
        )
        coming = sum(block.disk for block in blocks) - once - stay
        later = max(computing + coming * cost, coming / rates.read_bytes)
        # in the first step the layers that are needed once, and what stays, are read as well
        first = max(computing + (coming + once) * cost, (coming + once + stay) / rates.read_bytes)
        return reading + stay / rates.fill_bytes + first + (self.work.steps - 1) * later
