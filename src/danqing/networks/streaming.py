"""Networks whose blocks are read from disk while those before them are computed.

A block's bytes are read into a ring of memory that is used again and again, and its parameters are
views of that memory until the next block is wanted. The order is known, so reading runs ahead of
the arithmetic as far as the ring is long, and from the last block of a step to the first of the
next. The numbers are those of the files, so a picture is the same bit for bit.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from danqing.networks.units import spans_of
from danqing.weights.ranges import BLOCK, RangeReader, as_memory, lay_out

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from concurrent.futures import Future

    from torch.utils.hooks import RemovableHandle

    from danqing.devices import Device
    from danqing.networks.loading import Piece
    from danqing.networks.units import Source, Unit
    from danqing.weights import Component
    from danqing.weights.ranges import Layout, Reading, Span

_STREAMED = "_danqing_streamed"
_ALIGNED = 64
"""Bytes, as torch aligns memory on a CPU."""


@dataclass(frozen=True)
class Recoding:
    """Another form that blocks are computed in, made of each when it was read.

    Attributes:
        takes: says which layers change; their weights may come as bytes, if they lie so.
        make: gives a block that form; with the scales of the rows of weights that came as bytes,
            by the parameter's id. Returns the ids of the parameters not needed any more.
        undo: takes it away.
        kept: names of the blocks that keep it, and are not read again.
    """

    takes: Callable[[torch.nn.Module], bool]
    make: Callable[[torch.nn.Module, Mapping[int, torch.Tensor]], set[int]]
    undo: Callable[[torch.nn.Module], None]
    kept: Collection[str]


class Ring:
    """Memory that is handed out and taken back in the same order."""

    def __init__(self, size: int, device: Device) -> None:
        """Take memory that can be read into directly, and that the device can copy from.

        Args:
            size: in bytes; at least the largest unit.
            device: where its contents go.
        """
        self.bytes: torch.Tensor = device.staging(size)
        self.view = as_memory(self.bytes)
        self._live: deque[tuple[int, int]] = deque()
        self._owner: Streamed | None = None

    def __len__(self) -> int:
        """Bytes."""
        return len(self.view)

    def take(self, size: int) -> int | None:
        """Return the first byte of `size` free ones, or None if there are not so many."""
        start = 0
        if self._live:
            first, last = self._live[0][0], self._live[-1][1]
            start = last
            if last > first:
                if size > len(self) - last:
                    start = 0
                    if size >= first:
                        return None
            elif last + size >= first:
                return None
        elif size > len(self):
            return None
        self._live.append((start, start + size))
        return start

    def give_back(self) -> None:
        """Take back what was handed out first."""
        self._live.popleft()

    def lend(self, owner: Streamed | None) -> None:
        """Give the whole ring to one network; the one that had it stops reading."""
        if self._owner is not owner:
            if self._owner is not None:
                self._owner.give_way()
            self._owner = owner

    def leave(self, owner: Streamed) -> None:
        """Forget a network that is closed; it refers to this memory, and would keep it."""
        if self._owner is owner:
            self._owner = None


@dataclass
class _Coming:
    """A unit that is being read, and the memory that its bytes go to."""

    index: int
    reading: Reading
    memory: torch.Tensor
    ready: Future[list[torch.Tensor]] | None = None


@dataclass
class _Planned:
    """A unit with its place in files and in the network.

    Attributes:
        scales: of the tensors that come as bytes, by number.
        wide: bytes that are made of each tensor; 0 where it is used as it was read.
        settled: it has its other form, and keeps it.
        held: its bytes as they lie in the files, once they were read, if it keeps them.
    """

    unit: Unit
    layout: Layout
    spans: Sequence[Span]
    module: torch.nn.Module
    parameters: list[torch.Tensor]
    empty: list[torch.Tensor]
    scales: dict[int, torch.Tensor]
    wide: list[int]
    settled: bool = False
    held: torch.Tensor | None = None

    @property
    def here(self) -> bool:
        """Whether it need not be read any more."""
        return self.settled or self.held is not None


class Streamed:
    """The part of one network that comes and goes.

    Attributes:
        waited: seconds that the arithmetic waited for the disk.
        read_bytes: read so far.
        reads: how often the reading of each unit has begun, by name.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        source: Source,
        units: Sequence[Unit],
        ring: Ring,
        reader: RangeReader,
        *,
        recoding: Recoding | None = None,
        holding: Collection[str] = (),
    ) -> None:
        """Watch for the layers that need a unit; nothing is read yet.

        Args:
            module: with placeholders in the places of the units' tensors.
            source: where these come from.
            units: in the order in which they are needed.
            ring: memory, which may be other networks' too.
            reader: of the files.
            recoding: the form that blocks are computed in, if it is not that of the files.
            holding: names of the units whose bytes stay as they lie in the files.
        """
        self._holding = holding
        self._source = source
        self._recoding = recoding
        self._ring = ring
        self._reader = reader
        self.waited = 0.0
        self.read_bytes = 0
        self.reads: Counter[str] = Counter()
        self._bound: int | None = None
        self._lent = False  # the bound unit's bytes lie in the ring
        self._coming: deque[_Coming] = deque()
        self._passes = 1
        self._runs = 0
        self._hooks: list[RemovableHandle] = []
        self._planned = [self._plan(module, unit) for unit in units]
        self._once = True  # layers that are needed once are among what comes
        self._latest: int | None = None  # what was bound last in this run
        # widened tensors have memory of their own, the same for each block: theirs would be torn to
        # pieces by what is kept between blocks, and never be large enough again
        own_memory = source.device.shares_host_memory()
        self._uploader = None if own_memory else ThreadPoolExecutor(1, "danqing-upload")
        wide = (_places(one.wide)[1] for one in self._planned if own_memory)
        self._wide_bytes = max(wide, default=0)
        self._wide = torch.empty(0, dtype=torch.uint8)
        for index, unit in enumerate(units):
            # the block's own hook too: a layer's forward is looked up before its hooks are called
            layers = (name.rpartition(".")[0] for name in unit.tensors)
            for path in dict.fromkeys([unit.name, *layers]):
                hook = partial(self._before, index)
                self._hooks.append(module.get_submodule(path).register_forward_pre_hook(hook))

    def _plan(self, module: torch.nn.Module, unit: Unit) -> _Planned:
        pieces = [self._source.pieces[name] for name in unit.tensors]
        spans = spans_of(self._source.component, pieces) or []
        parameters = [_tensor_at(module, name) for name in unit.tensors]
        empty = [parameter.data for parameter in parameters]
        layer = module.get_submodule(unit.name)
        scales = {} if unit.once else self._scales(module, unit)
        wide = [
            0 if number in scales else self._source.wide_bytes(name)
            for number, name in enumerate(unit.tensors)
        ]
        return _Planned(unit, lay_out(spans), spans, layer, parameters, empty, scales, wide)

    def _scales(self, module: torch.nn.Module, unit: Unit) -> dict[int, torch.Tensor]:
        """Return the scales of the weights that the other form is made of as they lie."""
        found = {}
        for number, name in enumerate(unit.tensors):
            owner, _, leaf = name.rpartition(".")
            takes = self._recoding is not None and self._recoding.takes(module.get_submodule(owner))
            scales = self._source.row_scales(name) if takes and leaf == "weight" else None
            if scales is not None:
                found[number] = scales
        return found

    @property
    def settled(self) -> set[str]:
        """Names of the units that need not be read any more."""
        return {planned.unit.name for planned in self._planned if planned.here}

    @property
    def pending(self) -> list[str]:
        """Names of the units whose reading is under way, in the order in which they are needed."""
        return [self._planned[coming.index].unit.name for coming in self._coming]

    def expect(self, passes: int, *, once: bool) -> None:
        """Say how often the network will be computed, so that reading goes on from end to start.

        From the second run on, the first blocks of another are read when the last of one is bound.

        Args:
            passes: how often.
            once: the layers that are needed once will be computed, too.
        """
        self._passes = passes
        self._once = once
        self._latest = None
        self._runs += 1

    def stop(self) -> None:
        """Let go of what is there and of what is under way."""
        self._unbind()
        while self._coming:
            coming = self._coming.popleft()
            for one in (coming.ready, coming.reading):
                _settle(one)
            if not self._holds(coming.index):
                self._ring.give_back()

    def give_way(self) -> None:
        """Stop, and give back the memory for what is widened: another network is computed."""
        self.stop()
        self._wide = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Stop, end the thread that copies, and let go of the network, whose hooks lead here."""
        self.stop()
        self._ring.leave(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._planned.clear()
        if self._uploader is not None:
            self._uploader.shutdown()

    # --- one unit after the other ------------------------------------------------------------

    def _before(self, index: int, module: torch.nn.Module, given: Any) -> None:  # noqa: ARG002
        if index != self._bound and not self._planned[index].settled:
            self._bind(index)
            if self._recoding is not None and not self._planned[index].unit.once:
                self._recode(index, self._recoding)

    def _bind(self, index: int) -> None:
        """Put a unit's tensors in their places, and begin to read those that come after it."""
        self._ring.lend(self)
        self._unbind()
        planned = self._planned[index]
        if self._latest is not None and index <= self._latest:
            self._once = False
        if planned.held is None:
            tensors = self._arrived(index)
        else:
            self._read_ahead(index)
            tensors = self._decoded(index, planned.held)
        for parameter, tensor in zip(planned.parameters, tensors, strict=True):
            self._source.device.adopt(tensor)
            parameter.data = tensor
        self._bound = self._latest = index
        self._lent = planned.held is None

    def _arrived(self, index: int) -> list[torch.Tensor]:
        """Return a unit's tensors, when they were read."""
        if not self._coming or self._coming[0].index != index:
            self.stop()
            self._begin(index, after=self._latest)
        self._read_ahead(index)
        coming = self._coming[0]
        start = time.perf_counter()
        try:
            coming.reading.wait()
            self.waited += time.perf_counter() - start
            self.read_bytes += self._planned[index].layout.size
            ready = coming.ready
            tensors = self._decoded(index, coming.memory) if ready is None else ready.result()
        except BaseException:
            self.stop()
            raise
        self._coming.popleft()
        if self._holds(index):
            self._planned[index].held = coming.memory
        return tensors

    def _holds(self, index: int) -> bool:
        return self._planned[index].unit.name in self._holding

    def _recode(self, index: int, recoding: Recoding) -> None:
        """Give the bound block its other form, and its memory in the ring to one that comes."""
        planned = self._planned[index]
        with torch.inference_mode(mode=False), torch.no_grad():
            scales = {id(planned.parameters[i]): one for i, one in planned.scales.items()}
            gone = recoding.make(planned.module, scales)
            for parameter, empty in zip(planned.parameters, planned.empty, strict=True):
                parameter.data = empty if id(parameter) in gone else parameter.data.clone()
        self._lent = False
        self._ring.give_back()
        if planned.unit.name in recoding.kept:
            planned.settled = True
            self._bound = None
        self._read_ahead(index)

    def _unbind(self) -> None:
        if self._bound is None:
            return
        planned = self._planned[self._bound]
        for parameter, empty in zip(planned.parameters, planned.empty, strict=True):
            parameter.data = empty
        self._bound = None
        if self._lent:
            self._ring.give_back()
        elif self._recoding is not None:
            self._recoding.undo(planned.module)

    def _read_ahead(self, bound: int) -> None:
        """Start reading what comes next, as far as the ring has room."""
        # Every step runs the same units in the same order, so what comes next is known, also past
        # the end of a step: there it wraps around, unless this is the only pass of the only run.
        # Units that stay, and those needed once, are skipped when they were read before. The first
        # one without room ends the search: a later one that fits would take its place in the ring,
        # and the computation waits for the units in order.
        kept = () if self._recoding is None else self._recoding.kept
        index = self._coming[-1].index if self._coming else bound
        for _ in self._planned:
            index += 1
            if index == len(self._planned):
                if self._passes <= 1 and self._runs <= 1:
                    return
                index = 0
            planned = self._planned[index]
            if planned.here:
                continue
            # read before, or under way: what stays, or is needed once, is not read again
            again = index <= bound or any(one.index == index for one in self._coming)
            if again and (planned.unit.name in kept or self._holds(index)):
                continue
            if planned.unit.once and (again or not self._once):
                continue
            if not self._begin(index, after=bound):
                return

    def _begin(self, index: int, *, after: int | None) -> bool:
        """Start reading a unit, if the ring has room for it; `after` is the one that is bound."""
        planned = self._planned[index]
        if self._holds(index):
            memory = self._source.device.staging(planned.layout.size)
        else:
            start = self._ring.take(planned.layout.size)
            if start is None:
                return False
            memory = self._ring.bytes[start : start + planned.layout.size]
        last = self._coming[-1].index if self._coming else after
        if last is not None and index <= last:
            self._passes -= 1
            self._once = False
        self.reads[planned.unit.name] += 1
        reading = self._reader.start(planned.layout, as_memory(memory))
        coming = _Coming(index, reading, memory)
        if self._uploader is not None:
            coming.ready = self._uploader.submit(self._upload, coming)
        self._coming.append(coming)
        return True

    def _upload(self, coming: _Coming) -> list[torch.Tensor]:
        coming.reading.wait()
        with self._source.device.uploading(), torch.no_grad():
            return self._decoded(coming.index, coming.memory)

    def _decoded(self, index: int, memory: torch.Tensor) -> list[torch.Tensor]:
        planned = self._planned[index]
        if len(self._wide) < self._wide_bytes:
            with torch.inference_mode(mode=False):  # it is written to again outside of that, too
                self._wide = self._source.device.staging(self._wide_bytes)
        found = []
        for number, (name, span, first, size, place_) in enumerate(zip(
            planned.unit.tensors, planned.spans, planned.layout.places,
            planned.wide, _places(planned.wide)[0], strict=True,
        )):  # fmt: skip
            data = memory[first : first + span.stop - span.start]
            if number in planned.scales:
                found.append(data.view(torch.int8).view(len(planned.scales[number]), -1))
                continue
            out = None
            if size and self._uploader is None:
                out = self._wide[place_ : place_ + size].view(self._source.dtype_of(name))
            found.append(self._source.decode(name, data, out))
        return found


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where tensors lie behind each other, aligned as torch does it, and where they end."""
    ends = list(accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes))
    return [0, *ends[:-1]], ends[-1] if ends else 0


@dataclass
class Streaming:
    """What networks need to be streamed; one for an engine.

    Attributes:
        device: where the blocks are computed.
        ring: memory that they are read into.
        reader: of the files.
        staying: of each component that is streamed, the names of the units that stay in the dtype
            that computes; of others, the tensors are read through the ring, and stay.
        holding: of a component, the names of the units that stay as they lie in the files.
        recoding: of a component, the form that its blocks are computed in.
        streamed: by component.
    """

    device: Device
    ring: Ring
    reader: RangeReader
    staying: Mapping[str, Collection[str]]
    holding: Mapping[str, Collection[str]] = field(default_factory=dict)
    recoding: Mapping[str, Recoding] = field(default_factory=dict)
    streamed: dict[str, Streamed] = field(default_factory=dict)

    def attach(
        self, component: str, module: torch.nn.Module, source: Source, units: Sequence[Unit]
    ) -> None:
        """Let a network's units come and go."""
        self.streamed[component] = Streamed(
            module, source, units, self.ring, self.reader,
            recoding=self.recoding.get(component), holding=self.holding.get(component, ()),
        )  # fmt: skip
        setattr(module, _STREAMED, self.streamed[component])

    def read(self, component: Component, piece: Piece, dtype: torch.dtype) -> torch.Tensor | None:
        """Return a tensor's rows, read and not mapped; None if they are no plain range of a file.

        They are read by way of the ring, as many at a time as it has room for.
        """
        whole = spans_of(component, [piece])
        shape = component.entries[piece.source].shape
        if whole is None or not shape or piece.source in component.adapters:
            return None  # an adapter is added to all rows at once, or the last bits would differ
        rows = piece.stop - piece.start
        out = torch.empty((rows, *shape[1:]), dtype=dtype)
        each = (whole[0].stop - whole[0].start) // rows
        at_once = max(1, (len(self.ring) - 2 * BLOCK) // each)
        self.ring.lend(None)
        for start in range(piece.start, piece.stop, at_once):
            stop = min(start + at_once, piece.stop)
            some = replace(piece, start=start, stop=stop)
            spans = spans_of(component, [some])
            if spans is None or lay_out(spans).size > len(self.ring):
                return None
            layout = lay_out(spans)
            self.reader.start(layout, self.ring.view[: layout.size]).wait()
            first = layout.places[0]
            data = self.ring.bytes[first : first + spans[0].stop - spans[0].start]
            found = component.decode(piece.source, data, (start, stop), dtype)
            out[start - piece.start : stop - piece.start] = found
        return out

    def detach(self, component: str) -> None:
        """Let go of a network that is dropped."""
        if component in self.streamed:
            self.streamed.pop(component).close()

    def close(self) -> None:
        """Let go of everything."""
        for name in list(self.streamed):
            self.detach(name)
        self.reader.close()


def _tensor_at(module: torch.nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(module.get_submodule(owner), leaf)
    return tensor


def _settle(one: Any) -> None:
    """Wait for something whose outcome no longer matters; its memory is used again."""
    if one is None:
        return
    with contextlib.suppress(Exception):  # what it was read for has failed already, or ended
        one.wait() if hasattr(one, "wait") else one.result()


def streamed_part(module: torch.nn.Module) -> Streamed | None:
    """Return what comes and goes of a network, if it is one that is streamed."""
    found: Streamed | None = getattr(module, _STREAMED, None)
    return found
