"""How much memory each way of placing the weights takes, and which of those that fit is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from danqing.plan.rates import Rates

Placement = Literal["resident", "staged", "streamed"]
"""`resident`: everything stays on the device. `staged`: each stage's components are read when it
begins and dropped when it ends. `streamed`: so, and of the large ones the blocks come and go while
they are computed."""

RING_UNITS = (3.0, 2.5, 2.0, 1.5, 1.0)
"""How many of its largest blocks the memory for streaming may hold; with 1 nothing overlaps."""
READ_COST = 0.1e-9
"""Seconds of arithmetic lost for each byte read beside it (decision 0013)."""
RECODE_COST = 0.2e-9
"""Seconds for each byte of a block that is quantised after it was read (decision 0014)."""
INT8_SPEED = 1.9
"""How many times faster products of bytes are (decision 0014)."""
HIDDEN = 0.7
"""Share of a step's arithmetic that reading may take, so that it stays hidden when disks waver."""
SPARE = 160 << 20
"""Bytes that streaming holds beside what is counted: threads, large pages, the allocator's rest."""
SPARE_ONCE = 64 << 20
"""Such bytes more where layers that are needed once are read between the blocks."""
SMALLEST_TILE = 32
"""Latents of a tile's side, at least."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """What is streamed together.

    Attributes:
        name: path in the network.
        disk: bytes of the file.
        bytes: in the dtype that computes.
        wide: bytes that are made of those read, if it is not computed with these.
        stays: bytes that it takes if it stays while others are streamed: in int8 if that computes,
            as it is stored if that is less.
        once: it is needed in the first step only.
    """

    name: str
    disk: int
    bytes: int
    wide: int
    stays: int
    once: bool


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component as the budget sees it.

    Attributes:
        name: of the component.
        disk: bytes of its files that are read.
        bytes: of all its weights where they are computed.
        blocks: what of it can be streamed, in order.
        extra: bytes that are needed beside them while it is read whole.
        tables: bytes that stay mapped when it is streamed, and of which next to nothing is used.
        mapped: its pages count when they are used, not when it is opened.
        recoded: its blocks are computed in int8.
        compact: its blocks take fewer bytes as they are stored, and stay so where they stay.
    """

    name: str
    disk: int
    bytes: int
    blocks: tuple[Block, ...] = ()
    extra: int = 0
    mapped: bool = False
    recoded: bool = False
    compact: bool = False
    tables: int = 0

    @property
    def rest(self) -> int:
        """Bytes that stay while the blocks are streamed."""
        return self.bytes - sum(block.bytes for block in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run will do, as far as memory and time depend on it.

    Attributes:
        stages: names of the components of each stage, in order.
        activations: bytes of each stage beside weights.
        flops: operations of each stage; of `denoise` for one step.
        steps: of denoising.
        base: bytes of the process before anything is loaded; 0 where they are not the device's.
        tiles: sides of tiles, the largest first, and what decoding takes with each.
    """

    stages: Mapping[str, tuple[str, ...]]
    activations: Mapping[str, int]
    flops: Mapping[str, float]
    steps: int
    base: int
    tiles: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """One way of placing the weights.

    Attributes:
        placement: which.
        streamed: of each streamed component, the names of the blocks that stay.
        ring: bytes that blocks are read into.
        kept: components that stay from picture to picture.
        tile: side in latents of the tiles that are decoded; 0: the picture is decoded whole.
        peaks: bytes of each stage at its worst.
    """

    placement: Placement
    streamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ring: int = 0
    kept: tuple[str, ...] = ()
    tile: int = 0
    peaks: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of the worst stage."""
        return max(self.peaks.values())

    @property
    def worst(self) -> str:
        """The stage that needs the most."""
        return max(self.peaks, key=lambda stage: self.peaks[stage])


def resident(parts: Mapping[str, Part], work: Work) -> Arrangement:
    """Everything stays; pages of mapped weights count from the stage that uses them first on."""
    peaks = {}
    held = 0
    loaded: set[str] = set()
    for stage, names in work.stages.items():
        new = [name for name in names if name not in loaded]
        loaded.update(new)
        reading = held + _while_read([parts[name] for name in new])
        held += sum(parts[name].bytes for name in new)
        peaks[stage] = work.base + max(reading, held + work.activations[stage])
    return Arrangement(placement="resident", kept=tuple(parts), peaks=peaks)


def staged(parts: Mapping[str, Part], work: Work, limit: int = 0) -> Arrangement:
    """Each stage's components are there while it lasts, and some longer if there is room."""
    peaks = {}
    for stage, names in work.stages.items():
        weights = sum(parts[name].bytes for name in names)
        reading = _while_read([parts[name] for name in names])
        peaks[stage] = work.base + max(weights + work.activations[stage], reading)
    return _keeping(Arrangement(placement="staged", peaks=peaks), parts, work, limit)


def _while_read(parts: Sequence[Part]) -> int:
    """Return the bytes of some components while the last of them is read."""
    held, most = 0, 0
    for part in parts:
        held += 0 if part.mapped else part.bytes
        most = max(most, held + part.extra)
    return most


def streamings(
    parts: Mapping[str, Part], work: Work, limit: int, rates: Rates | None, *, all_of_it: bool
) -> Iterator[Arrangement]:
    """Yield ways of streaming what is too large for a stage, the best first.

    Args:
        parts: by name.
        work: what will be done.
        limit: bytes.
        rates: of this machine; None where reading is always slower than keeping.
        all_of_it: stream whatever can be, even if it would fit; and keep nothing.
    """
    # A stage that fits is not streamed on a card: memory is faster than any disk. On a CPU reading
    # ahead into a ring beats the page faults of mapped weights, so that once anything is streamed,
    # everything large is. Small components beside a large one are never worth it.
    every = all_of_it or rates is not None
    too_large = {stage for stage, peak in staged(parts, work).peaks.items() if peak > limit}
    chosen = [
        name
        for stage, names in work.stages.items()
        for name in names
        if parts[name].blocks
        and (
            parts[name].recoded or ((every or stage in too_large) and _is_large(parts, names, name))
        )
    ]
    chosen = list(dict.fromkeys(chosen))
    if not chosen:
        return
    largest = max(block.disk for name in chosen for block in parts[name].blocks)
    # Ring and blocks that stay compete for the same bytes. A ring of three blocks hides uneven
    # disks best, so it comes first; what room is left keeps blocks from being read in every step.
    # Each smaller ring overlaps less, and is offered because it may fit where that one did not.
    for units in RING_UNITS:
        ring = int(units * largest)
        plain = _streaming(parts, work, dict.fromkeys(chosen, ()), ring)
        stay: dict[str, tuple[str, ...]] = dict.fromkeys(chosen, ())
        room = limit - plain.peaks["denoise"]
        for name in work.stages["denoise"]:
            if name in stay and not all_of_it:
                stay[name] = staying(parts[name], work, room, rates)
                room -= sum(b.stays for b in parts[name].blocks if b.name in stay[name])
        found = _streaming(parts, work, stay, ring)
        yield found if all_of_it else _keeping(found, parts, work, limit)


def _is_large(parts: Mapping[str, Part], names: Sequence[str], name: str) -> bool:
    """Say whether a component is worth streaming: not the small ones beside a large one."""
    return 4 * parts[name].bytes > max(parts[other].bytes for other in names)


def _streaming(
    parts: Mapping[str, Part], work: Work, stay: Mapping[str, tuple[str, ...]], ring: int
) -> Arrangement:
    peaks = {}
    for stage, names in work.stages.items():
        peaks[stage] = (
            work.base
            + SPARE
            + (SPARE_ONCE if any(_has_once(parts[name], stay) for name in names) else 0)
            + (ring if stay.keys() & set(names) else 0)
            + sum(_held(parts[name], stay) - parts[name].tables for name in names)
            + max(_made_anew(parts[name], stay) for name in names)
            + work.activations[stage]
        )
    return Arrangement(placement="streamed", streamed=stay, ring=ring, peaks=peaks)


def _has_once(part: Part, stay: Mapping[str, tuple[str, ...]]) -> bool:
    return part.name in stay and any(block.once for block in part.blocks)


def tiled(found: Arrangement, work: Work) -> Iterator[Arrangement]:
    """Yield the same with smaller and smaller tiles."""
    for side, taken in work.tiles.items():
        spared = work.activations["decode"] - taken
        peaks = {**found.peaks, "decode": found.peaks["decode"] - spared}
        yield replace(found, peaks=peaks, tile=side)


def _held(part: Part, stay: Mapping[str, tuple[str, ...]]) -> int:
    """Return the bytes of a component that are there as long as it is loaded."""
    if part.name not in stay:
        return part.bytes
    here = set(stay[part.name])
    return part.rest + sum(block.stays for block in part.blocks if block.name in here)


def _made_anew(part: Part, stay: Mapping[str, tuple[str, ...]]) -> int:
    """Return the bytes of the largest block in other forms than that in which it was read."""
    if part.name not in stay:
        return 0
    wide = max(block.wide for block in part.blocks)
    return wide + (max(block.stays for block in part.blocks) if part.recoded else 0)


def _keeping(found: Arrangement, parts: Mapping[str, Part], work: Work, limit: int) -> Arrangement:
    """Let components that are needed for every picture stay, if there is room for them."""
    for name in dict.fromkeys([*work.stages["denoise"], *work.stages["decode"]]):
        held = _held(parts[name], found.streamed)
        reading = found.ring + _made_anew(parts[name], found.streamed)
        peaks = {}
        for stage, peak in found.peaks.items():
            names = set(work.stages[stage])
            # another network that is streamed takes over the memory for reading and widening
            alone = name in found.streamed and not found.streamed.keys() & names
            here = 0 if name in names else held + (reading if alone else 0)
            peaks[stage] = peak + here
        if max(peaks.values()) <= limit:
            found = replace(found, peaks=peaks, kept=(*found.kept, name))
    return found


def staying(part: Part, work: Work, room: int, rates: Rates | None) -> tuple[str, ...]:
    """Choose the blocks that stay, spread evenly over the step.

    As many as there is room for; but on a machine that reads while it computes, only so many that
    reading the others hides behind the arithmetic, if filling memory takes longer than it saves.
    """
    blocks = [block for block in part.blocks if not block.once]
    each = max(block.stays for block in blocks)
    most = min(len(blocks), max(0, room // each))
    count = most
    if rates is not None:
        count = min(
            range(most + 1), key=lambda n: _seconds(blocks, n, work, rates, recoded=part.recoded)
        )
    if not count:
        return ()
    return tuple(blocks[i * len(blocks) // count].name for i in range(count))


def _seconds(
    blocks: Sequence[Block], count: int, work: Work, rates: Rates, *, recoded: bool
) -> float:
    """Estimate what keeping `count` blocks costs and saves in a run, in seconds."""
    share = count / len(blocks)
    kept = share * sum(block.stays for block in blocks)
    streamed = (1 - share) * sum(block.disk for block in blocks)
    computing = work.flops["denoise"] / rates.matmul_flops / (INT8_SPEED if recoded else 1)
    stall = max(0.0, streamed / rates.read_bytes - HIDDEN * computing)
    each = stall + streamed * (READ_COST + (RECODE_COST if recoded else 0))
    return kept / rates.fill_bytes + work.steps * each


def tiles_of(height: int, width: int) -> list[int]:
    """Return the sides of tiles worth trying, the largest first: 3/4 of the longer side, and on."""
    longest = max(height, width)
    sides = [longest * part // 16 for part in (12, 10, 8, 6, 5, 4, 3, 2)]
    return [side for side in dict.fromkeys(sides) if SMALLEST_TILE <= side < longest]
