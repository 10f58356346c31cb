"""Is a run deterministic? The same request again, in every way that should change nothing."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danqing.verify.joints import Comparison, compare_traces
from danqing.verify.metrics import histogram
from danqing.verify.runs import record, run, spent

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from danqing.generation import Picture
    from danqing.request import Resolved
    from danqing.runner import Probed
    from danqing.verify.trace import Trace

OTHER_PROMPT = "something else, in between"


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One more time, and what came of it.

    Attributes:
        way: how it was repeated.
        comparison: with the first time.
        seconds: of the run, loading included.
    """

    way: str
    comparison: Comparison
    seconds: float

    @property
    def identical(self) -> bool:
        """Whether every joint has the same bits."""
        return self.comparison.identical


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What computing several pictures together did to the first of them.

    Attributes:
        size: pictures in the batch.
        comparison: of its joints, in the batch and alone.
        largest: the largest difference of a pixel, in levels.
    """

    size: int
    comparison: Comparison
    largest: int


@dataclass(frozen=True, kw_only=True)
class Determinism:
    """What was found.

    Attributes:
        first: the run that the others are compared with.
        picture: what it painted.
        again: what the next run painted.
        repeats: in the order they were made.
        batch: what a batch does to the bits; None if it was not tried.
    """

    first: Trace
    picture: Picture
    again: Picture
    repeats: tuple[Repeat, ...]
    batch: Batch | None

    @property
    def passed(self) -> bool:
        """Whether every repeat was identical; a batch is told, not judged."""
        return all(repeat.identical for repeat in self.repeats)


def check_determinism(
    engine: Probed,
    request: Resolved,
    *,
    folder: Path,
    in_another_process: Callable[[Path], Trace] | None = None,
    batch: int = 0,
) -> Determinism:
    """Run a request again and again, and compare all that can be seen.

    Args:
        engine: opened.
        request: for one picture.
        folder: for the traces, which the caller removes.
        in_another_process: writes a trace of the same request to a place, in a process of its own.
        batch: how many pictures to compute together, to see what that does; 0 for none.
    """

    def again(name: str) -> Trace:
        return record(engine, request, folder / f"{name}.trace")

    first, picture = run(engine, request, folder / "first.trace")
    second, second_picture = run(engine, request, folder / "again.trace")
    repeats = [_repeat("again in this process", first, second)]
    engine.generate(request.request.replace(prompt=OTHER_PROMPT, seed=request.seed ^ 1))
    repeats.append(_repeat("after another request", first, again("after")))
    engine.close()
    repeats.append(_repeat("after loading again", first, again("loaded")))
    if in_another_process is not None:
        other = in_another_process(folder / "process.trace")
        repeats.append(_repeat("in another process", first, other))
    alone, place = (first, picture), folder / "batch.trace"
    return Determinism(
        first=first,
        picture=picture,
        again=second_picture,
        repeats=tuple(repeats),
        batch=_in_a_batch(engine, request, alone, batch, place) if batch > 1 else None,
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What deterministic kernels cost.

    Attributes:
        seconds: of one picture, loading left out, with the kernels the device prefers; a median.
        deterministic_seconds: the same with deterministic kernels only.
        identical: whether both give the same pixels.
    """

    seconds: float
    deterministic_seconds: float
    identical: bool


def measure_cost(opened: Callable[[bool], Probed], request: Resolved, *, repeats: int = 3) -> Cost:
    """Paint with and without deterministic kernels, in turn, and take the medians.

    Args:
        opened: opens the engine, with deterministic kernels only if told so.
        request: for one picture.
        repeats: of each; one more comes first and does not count.
    """
    engines = {asked: opened(asked) for asked in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    digests = set()
    for number in range(repeats + 1):
        for asked, engine in engines.items():
            (picture,) = engine.generate(request).pictures
            digests.add(picture.pixels_sha256)
            if number:
                seconds[asked].append(spent(picture))
    for engine in engines.values():
        engine.close()
    return Cost(
        seconds=statistics.median(seconds[False]),
        deterministic_seconds=statistics.median(seconds[True]),
        identical=len(digests) == 1,
    )


def _repeat(way: str, first: Trace, again: Trace) -> Repeat:
    seconds = sum(stage["seconds"] for stage in again.about["stages"])
    return Repeat(way=way, comparison=compare_traces(again, first), seconds=seconds)


def _in_a_batch(
    engine: Probed, request: Resolved, alone: tuple[Trace, Picture], size: int, place: Path
) -> Batch:
    trace, picture = alone
    together, first = run(engine, request.request.replace(num_images_per_prompt=size), place)
    return Batch(
        size=size,
        comparison=compare_traces(together, trace),
        largest=len(histogram(first.image, picture.image)) - 1,
    )
