"""Is a run deterministic? The same request again, in every way that should change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from danqing.verify.joints import Comparison, compare_traces
from danqing.verify.trace import Recorder, Trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from danqing.request import Generation, Inside, Picture, Probe, Request

OTHER_PROMPT = "something else, in between"


class Probed(Protocol):
    """What is checked: an engine, or a fake in a test."""

    def probe(self, request: Request, probe: Probe, /, *, inside: Inside | None = None) -> Picture:
        """Make one picture, its joints shown, and the outputs of some layers."""
        ...

    def generate(self, prompt: Request, /, *, batch: int = 1) -> Generation:
        """Make pictures."""
        ...

    def close(self) -> None:
        """Give all memory back; what comes next loads again."""
        ...


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
class Determinism:
    """What was found.

    Attributes:
        first: the run that the others are compared with.
        repeats: in the order they were made.
        batch: what computing several pictures together did to the pixels of the first: its size,
            and the largest difference; None if it was not tried.
    """

    first: Trace
    repeats: tuple[Repeat, ...]
    batch: tuple[int, int] | None

    @property
    def passed(self) -> bool:
        """Whether every repeat was identical; a batch is told, not judged."""
        return all(repeat.identical for repeat in self.repeats)


def check_determinism(
    engine: Probed,
    request: Request,
    *,
    folder: Path,
    in_another_process: Callable[[Path], Trace] | None = None,
    batch: int = 0,
) -> Determinism:
    """Run a request again and again, and compare all that can be seen.

    Args:
        engine: opened.
        request: resolved, for one picture.
        folder: for the traces, which the caller removes.
        in_another_process: writes a trace of the same request to a place, in a process of its own.
        batch: how many pictures to compute together, to see what that does; 0 for none.
    """

    def again(name: str) -> Trace:
        return record(engine, request, folder / f"{name}.trace")

    first = again("first")
    repeats = [_repeat("again in this process", first, again("again"))]
    engine.generate(request.replace(prompt=OTHER_PROMPT, seed=(request.seed or 0) ^ 1))
    repeats.append(_repeat("after another request", first, again("after")))
    engine.close()
    repeats.append(_repeat("after loading again", first, again("loaded")))
    if in_another_process is not None:
        other = in_another_process(folder / "process.trace")
        repeats.append(_repeat("in another process", first, other))
    return Determinism(
        first=first,
        repeats=tuple(repeats),
        batch=_in_a_batch(engine, request, batch) if batch > 1 else None,
    )


def record(engine: Probed, request: Request, path: Path, *, digests: bool = False) -> Trace:
    """Run a request and write its trace."""
    with Recorder(path, digests=digests) as recorder:
        picture = engine.probe(request, recorder)
        return recorder.finish(about(picture))


def about(picture: Picture) -> dict[str, Any]:
    """Return what a trace tells of its run: a picture's record without what is of the file."""
    found = picture.record()
    return {key: found[key] for key in ("request", "provenance", "stages", "picture")}


def _repeat(way: str, first: Trace, again: Trace) -> Repeat:
    seconds = sum(stage["seconds"] for stage in again.about["stages"])
    return Repeat(way=way, comparison=compare_traces(again, first), seconds=seconds)


def _in_a_batch(engine: Probed, request: Request, batch: int) -> tuple[int, int]:
    from PIL import ImageChops

    alone = engine.generate(request).image
    many = engine.generate(request.replace(num_images_per_prompt=batch), batch=batch)
    ranges: Any = ImageChops.difference(alone, many.image).getextrema()
    return batch, max(high for _, high in ranges)
