"""Running a request with every joint recorded: what all checks begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing.verify.trace import Recorder

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.generation import Picture
    from danqing.request import Request, Resolved
    from danqing.runner import Inside, Probed
    from danqing.verify.trace import Trace


def record(
    engine: Probed,
    request: Resolved,
    path: Path,
    *,
    digests: bool = False,
    inside: Inside | None = None,
    sample: int | None = None,
) -> Trace:
    """Run a request and write its trace; of layers inside, keep a sample of each."""
    with Recorder(path, digests=digests, sample=sample) as recorder:
        picture = engine.probe(request, recorder, inside=inside)
        return recorder.finish(about(picture))


def run(engine: Probed, request: Request | Resolved, path: Path) -> tuple[Trace, Picture]:
    """Run a request; return its trace and its picture."""
    with Recorder(path) as recorder:
        picture = engine.probe(request, recorder)
        return recorder.finish(about(picture)), picture


def about(picture: Picture) -> dict[str, Any]:
    """Return what a trace tells of its run: a picture's record without what is of the file."""
    found = picture.record()
    return {key: found[key] for key in ("request", "provenance", "stages", "picture")}


def spent(picture: Picture) -> float:
    """Return the seconds of a picture's stages, loading left out."""
    return sum(stage.seconds for stage in picture.stages if stage.name != "load")
