"""Verdicts for people, line by line, and for programs, as JSON types."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from danqing.quantities import size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from danqing.verify.determinism import Cost, Determinism
    from danqing.verify.invariance import Switch
    from danqing.verify.joints import Compared, Comparison
    from danqing.verify.metrics import Difference, Statistics
    from danqing.verify.parity import Parity
    from danqing.verify.trace import Trace


def determinism_lines(found: Determinism) -> Iterator[str]:
    """Say what was found of repeats."""
    origin = found.first.about["provenance"]
    yield f"{origin['model']['title']} on {origin['device']['name']} in {origin['dtype']}"
    for repeat in found.repeats:
        joints = repeat.comparison.joints
        what = f"identical, {len(joints)} tensors"
        if (bad := repeat.comparison.first_divergence) is not None:
            what = f"DIFFERENT from {bad.name} on{_apart(bad)}"
        yield f"{repeat.way:<24} {what} ({repeat.seconds:.2f} s)"
    if (batch := found.batch) is not None:
        how = "the same bits"
        if (bad := batch.comparison.first_divergence) is not None:
            how = f"different from {bad.name} on; pixels by at most {batch.largest}"
        yield f"{f'in a batch of {batch.size}':<24} {how} (told, not judged)"
    yield "deterministic" if found.passed else "NOT DETERMINISTIC"


def parity_lines(found: Parity, *, lpips: float | None = None) -> Iterator[str]:
    """Say what was found joint by joint, whose fault it is, and the verdict."""
    for label, origin in (
        ("candidate", found.candidate.record()["provenance"]),
        ("reference", found.reference.about["provenance"]),
    ):
        where = f"{origin['device']['name']} ({origin['device']['chip']})"
        yield f"{label:<10} {origin['model']['title']} on {where} in {origin['dtype']}"
    yield f"{'joint':<28} {'port':>10} {'precision':>10} {'limit':>10} {'drift':>10}"
    for joint in found.joints:
        numbers = (joint.port, joint.precision, joint.limit, joint.drift)
        row = " ".join(f"{number:>10.2e}" for number in numbers)
        yield f"{joint.name:<28} {row}  {'' if joint.passed else 'FAILED'}".rstrip()
    worst = max(found.joints, key=lambda joint: joint.port / joint.limit)
    yield (
        f"blame      at {worst.name}: precision {worst.precision:.2e}, port {worst.port:.2e} "
        f"({worst.port / worst.precision:.2f} times)"
    )
    learned = "" if lpips is None else f", LPIPS {lpips:.4f}"
    yield f"picture    {_seen(found.picture)}{learned}"
    yield f"  precision alone: {_seen(found.precision)}"
    for line in found.search:
        yield f"search     {line}"
    if found.culprit:
        yield f"culprit    {found.culprit}"
    for name, seen in found.inputs:
        yield f"  given    {name}: {_values(seen)}"
    yield found.rung or "DIFFERENT"


def _values(seen: Statistics) -> str:
    what = f"{seen.dtype} {list(seen.shape)}"
    if seen.least is None:
        return f"{what}, nothing finite"
    text = (
        f"{what}, {seen.least:.4g} to {seen.most:.4g}, mean {seen.mean:.4g}, deviation "
        f"{seen.deviation:.4g}"
    )
    return text + (f", {seen.not_finite} not finite" if seen.not_finite else "")


def cost_lines(price: Cost | None) -> Iterator[str]:
    """Say what deterministic kernels cost, if that was measured."""
    if price is None:
        return
    ratio = price.deterministic_seconds / price.seconds
    yield (
        f"{'deterministic kernels':<24} {price.deterministic_seconds:.3f} s a picture, "
        f"{price.seconds:.3f} s without ({ratio:.2f} times); "
        f"{'the same pixels' if price.identical else 'other pixels'}"
    )


def _seen(difference: Difference) -> str:
    return "identical" if difference.identical else str(difference)


def comparison_lines(found: Comparison, traces: Sequence[Trace]) -> Iterator[str]:
    """Say how two traces differ."""
    for label, trace in zip(("candidate", "reference"), traces, strict=True):
        origin = trace.about["provenance"]
        where = f"{origin['device']['name']} ({origin['device']['chip']})"
        what = f"{origin['model']['title']} on {where} in {origin['dtype']}"
        yield f"{label:<10} {what}: {trace.path}"
    for name, (wanted, seen) in found.settings.items():
        yield f"note: {name} is {seen!r}, of the reference {wanted!r}"
    yield f"{'joint':<32} {'relative L2':>12} {'largest':>12} {'cosine':>12} {'ULP':>10}"
    for joint in found.joints:
        yield _row(joint)
    if found.only:
        yield f"only in one of them: {', '.join(found.only)}"
    bad = found.first_divergence
    yield (
        "identical"
        if found.identical
        else (f"different from {bad.name} on" if bad is not None else "different")
    )


def _row(joint: Compared) -> str:
    if joint.identical:
        return f"{joint.name:<32} {'identical':>12}"
    if joint.distance is None:
        return f"{joint.name:<32} {'different':>12} {joint.note}"
    far = joint.distance
    ulps = "-" if far.ulps is None else str(far.ulps)
    numbers = f"{far.relative:>12.3e} {far.largest:>12.3e} {far.cosine:>12.9f} {ulps:>10}"
    return f"{joint.name:<32} {numbers}"


def _apart(joint: Compared) -> str:
    if joint.distance is None:
        return f" ({joint.note})"
    return f": relative L2 {joint.distance.relative:.2e}, largest {joint.distance.largest:.2e}"


def comparison_report(found: Comparison) -> dict[str, Any]:
    """Return how two traces differ, as JSON types."""
    bad = found.first_divergence
    return {
        "identical": found.identical,
        "first_divergence": None if bad is None else bad.name,
        "only_in_one": list(found.only),
        "settings": {name: list(pair) for name, pair in found.settings.items()},
        "joints": [
            {
                "name": joint.name,
                "identical": joint.identical,
                "distance": None if joint.distance is None else asdict(joint.distance),
                "note": joint.note,
            }
            for joint in found.joints
        ],
    }


def determinism_report(found: Determinism) -> dict[str, Any]:
    """Return what was found of repeats, as JSON types."""
    return {
        "passed": found.passed,
        "repeats": [
            {"way": repeat.way, "seconds": repeat.seconds, **comparison_report(repeat.comparison)}
            for repeat in found.repeats
        ],
        "batch": None
        if found.batch is None
        else {
            "size": found.batch.size,
            "max_pixel_difference": found.batch.largest,
            **comparison_report(found.batch.comparison),
        },
        **found.first.about,
    }


def switch_lines(found: Sequence[Switch]) -> Iterator[str]:
    """Say what each switch does."""
    yield f"{'switch':<26} {'verdict':<11} {'PSNR':>10} {'s':>8} {'peak':>11}"
    for one in found:
        if one.rung is None or one.psnr is None:
            yield f"{one.name:<26} {'not here':<11} {one.note}"
            continue
        away = "-" if one.psnr == float("inf") else f"{one.psnr:.2f} dB"
        peak = "-" if one.peak_bytes is None else size(one.peak_bytes)
        row = f"{one.name:<26} {one.rung:<11} {away:>10} {one.seconds:>8.3f} {peak:>11}"
        yield f"{row}  {one.note}".rstrip()
