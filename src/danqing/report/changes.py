"""What changed between two reports: after an upgrade of CANN, say, or on another chip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from danqing.report.document import Case, Report

NOISE = 0.1
"""Timings of one machine differ by this much from day to day; less is not told as a change."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that is not as it was.

    Attributes:
        where: section and item.
        before: in the first report; None if it was not there.
        after: in the second.
        ratio: after to before, of what is measured.
        worse: a verdict that passed and now fails.
    """

    where: str
    before: Any
    after: Any
    ratio: float | None = None
    worse: bool = False


def changes(before: Report, after: Report) -> tuple[Change, ...]:
    """Compare two reports: environment, weights, verdicts, pictures, errors, times, memory."""
    return tuple(_changes(before, after))


def _changes(before: Report, after: Report) -> Iterator[Change]:
    one, two = before.environment.model_dump(), after.environment.model_dump()
    software, libraries = ((_pop(one, name), _pop(two, name)) for name in ("software", "libraries"))
    yield from _plain("environment", one, two)
    yield from _plain("software", *software)
    yield from _plain("library", *libraries)
    kept = {"fingerprint", "dtype", "attention", "placement", "layout"}
    yield from _plain(
        "model", before.model.model_dump(include=kept), after.model.model_dump(include=kept)
    )
    cases = {case.name: case for case in before.cases}
    for case in after.cases:
        if case.name in cases:
            yield from _case(cases.pop(case.name), case)
        else:
            yield Change(where=case.name, before=None, after="there")
    for name in cases:
        yield Change(where=name, before="there", after=None)


def _pop(table: dict[str, Any], name: str) -> Any:
    return table.pop(name)


def _plain(where: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            yield Change(where=f"{where}: {name}", before=before.get(name), after=after.get(name))


def _case(before: Case, after: Case) -> Iterator[Change]:
    name = after.name
    yield from _plain(f"{name}, request", before.request, after.request)
    yield from _verdict(
        f"{name}: deterministic", before.determinism.passed, after.determinism.passed
    )
    if before.parity and after.parity:
        one, two = before.parity, after.parity
        if one.rung != two.rung:
            worse = one.passed and not two.passed
            yield Change(where=f"{name}: parity", before=one.rung, after=two.rung, worse=worse)
        joints = {joint.name: joint for joint in one.joints}
        for joint in two.joints:
            old = joints.get(joint.name)
            if old is not None and old.passed != joint.passed:
                where = f"{name}: {joint.name}"
                yield Change(where=where, before=old.port, after=joint.port, worse=not joint.passed)
    if before.picture.pixels_sha256 != after.picture.pixels_sha256:
        yield Change(
            where=f"{name}: the picture's pixels",
            before=before.picture.pixels_sha256[:16],
            after=after.picture.pixels_sha256[:16],
        )
    yield from _measured(name, before, after)


def _verdict(where: str, before: bool, after: bool) -> Iterator[Change]:  # noqa: FBT001
    if before != after:
        yield Change(where=where, before=before, after=after, worse=before)


def _measured(name: str, before: Case, after: Case) -> Iterator[Change]:
    one, two = before.timing.model_dump(), after.timing.model_dump()
    peaks = [
        {f"peak bytes, {stage}": count for stage, count in timing.pop("peak_bytes").items()}
        for timing in (one, two)
    ]
    watched = ("load_seconds", "seconds_per_step", "total_seconds", "share_of_peak")
    for key, old, new in [
        *((key, one[key], two[key]) for key in watched),
        *((key, old, peaks[1].get(key)) for key, old in peaks[0].items()),
    ]:
        if old and new and abs(new / old - 1) > NOISE:
            where = f"{name}: {key.replace('_', ' ')}"
            yield Change(where=where, before=old, after=new, ratio=new / old)
