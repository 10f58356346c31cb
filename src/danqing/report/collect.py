"""From runs and verdicts to a report."""

from __future__ import annotations

import math
import platform
import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from danqing.report import document
from danqing.verify.lpips import lpips as measure_lpips
from danqing.verify.metrics import (
    Difference,
    compare,
    difference_picture,
    histogram,
    visible_factor,
)
from danqing.verify.parity import FACTOR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from danqing.generation import Picture
    from danqing.verify import determinism, invariance, parity, sanity

STAGES = ("load", "encode", "denoise", "decode")


def environment(record: Mapping[str, Any], *, processor: str) -> document.Environment:
    """Return where a picture was made, from its record and this machine."""
    origin = record["provenance"]
    device = origin["device"]
    return document.Environment(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        processor=processor,
        device=device["name"],
        chip=device["chip"],
        simulated="simulated" in device["chip"].lower(),
        memory_bytes=device["memory_bytes"],
        threads=device["threads"],
        software={
            **device["software"],
            **({"runtime": device["driver"]} if device["driver"] else {}),
        },
        libraries=dict(origin["versions"]),
    )


def model(record: Mapping[str, Any], plan: Mapping[str, Any]) -> document.Model:
    """Return what ran, from a picture's record and the plan it followed."""
    origin = record["provenance"]
    loads = {
        stage["component"]: stage["seconds"]
        for stage in record["stages"]
        if stage["name"] == "load"
    }
    parts = [
        document.Component(
            name=part["name"],
            stored=part["stored"],
            dtype=part["dtype"],
            why=part["reason"],
            bytes=part["bytes"],
            mapped=part["mapped"],
            load_seconds=loads.get(part["name"]),
        )
        for part in plan["components"]
    ]
    names = ("dtype", "dtype_reason", "attention", "attention_reason", "placement")
    return document.Model(
        **{name: origin["model"][name] for name in ("name", "title", "layout", "path", "sha256")},
        fingerprint=origin["model"]["fingerprint"],
        **{name: plan[name] for name in names},
        placement_reason=plan["placement_reason"],
        device_reason=plan["device_reason"],
        components=parts,
    )


def timing(
    first: Picture, timed: Sequence[Picture], *, step_flops: int | None, peak_flops: float | None
) -> document.Timing:
    """Return medians of the pictures timed, and what loading took before the first."""

    def seconds(picture: Picture, name: str) -> float:
        return sum(stage.seconds for stage in picture.stages if stage.name == name)

    medians = {
        name: statistics.median(seconds(picture, name) for picture in timed) for name in STAGES
    }
    steps = sum(stage.steps for stage in first.stages if stage.name == "denoise")
    each = medians["denoise"] / steps
    achieved = step_flops / each if step_flops and each else None
    return document.Timing(
        repeats=len(timed),
        load_seconds=seconds(first, "load"),
        encode_seconds=medians["encode"],
        denoise_seconds=medians["denoise"],
        decode_seconds=medians["decode"],
        total_seconds=medians["encode"] + medians["denoise"] + medians["decode"],
        steps=steps,
        seconds_per_step=each,
        steps_per_second=1 / each if each else math.inf,
        step_flops=step_flops,
        achieved_flops=achieved,
        peak_flops=peak_flops,
        share_of_peak=achieved / peak_flops if achieved and peak_flops else None,
        peak_bytes={name: _peak([first, *timed], name) for name in STAGES},
    )


def _peak(pictures: Sequence[Picture], name: str) -> int | None:
    peaks = [
        stage.peak_bytes
        for picture in pictures
        for stage in picture.stages
        if stage.name == name and stage.peak_bytes is not None
    ]
    return max(peaks, default=None)


def repeated(found: determinism.Determinism, cost: determinism.Cost | None) -> document.Determinism:
    """Return what the repeats of a request showed."""
    batch = found.batch
    return document.Determinism(
        passed=found.passed,
        repeats=[
            document.Repeat(
                way=repeat.way,
                identical=repeat.identical,
                tensors=len(repeat.comparison.joints),
                first_divergence=_first(repeat.comparison.first_divergence),
            )
            for repeat in found.repeats
        ],
        pictures=difference(found.again.image, found.picture.image),
        batch=None
        if batch is None
        else document.Batch(
            size=batch.size,
            identical=batch.comparison.identical,
            first_divergence=_first(batch.comparison.first_divergence),
            largest=batch.largest,
        ),
        cost=None if cost is None else document.Cost(**asdict(cost)),
    )


def _first(joint: Any) -> str | None:
    return None if joint is None else str(joint.name)


def judged(
    found: parity.Parity,
    *,
    required: str,
    from_trace: bool,
    lpips: Path | None,
    folder: Path,
    prefix: str,
) -> document.Parity:
    """Return a verdict of parity; the reference's picture and the difference go into the folder."""
    factor = visible_factor(found.picture.largest)
    away = difference_picture(found.candidate.image, found.image, factor=factor)
    origin = found.reference.about["provenance"]
    worst = max(found.joints, key=lambda joint: joint.port / joint.limit)
    return document.Parity(
        reference={name: origin[name] for name in ("device", "dtype", "versions")},
        from_trace=from_trace,
        required=required,
        rung=found.rung,
        passed=required == "any" or found.reaches(required),
        factor=FACTOR,
        joints=[
            document.Joint(
                name=joint.name,
                port=_finite(joint.port),
                precision=joint.precision,
                limit=joint.limit,
                drift=_finite(joint.drift),
                passed=joint.passed,
            )
            for joint in found.joints
        ],
        worst=worst.name,
        picture=difference(found.candidate.image, found.image, lpips=lpips),
        precision=_measured(found.precision, []),
        culprit=found.culprit,
        inputs={name: asdict(seen) for name, seen in found.inputs},
        search=list(found.search),
        reference_file=save(found.image, folder, f"{prefix}-reference.png"),
        difference_file=save(away, folder, f"{prefix}-difference.png"),
        difference_factor=factor,
    )


def difference(
    candidate: Image, reference: Image, *, lpips: Path | None = None
) -> document.Difference:
    """Measure two images by every metric; by LPIPS if its weights are passed."""
    values = compare(candidate, reference)
    if lpips is not None:
        learned = {"lpips": measure_lpips(candidate, reference, lpips)}
        values = Difference({**values.values, **learned})
    return _measured(values, list(histogram(candidate, reference)))


def _measured(values: Difference, counts: list[int]) -> document.Difference:
    return document.Difference.of(values, histogram=counts)


def looked_at(found: sanity.Sanity) -> document.Sanity:
    """Return what the sanity gate says."""
    return document.Sanity(
        looks=found.looks, passed=found.passed, mean=found.mean, deviation=found.deviation
    )


def switched(found: Sequence[invariance.Switch]) -> list[document.Switch]:
    """Return what each switch does."""
    return [
        document.Switch(
            name=one.name,
            rung=one.rung,
            note=one.note,
            psnr_db=None if one.psnr is None else _finite(one.psnr),
            seconds=one.seconds,
            peak_bytes=one.peak_bytes,
        )
        for one in found
    ]


def save(image: Image, folder: Path, name: str) -> document.PictureFile:
    """Write a picture without a record beside the report."""
    from danqing.pictures import save as save_picture

    path = save_picture(image, {}, folder / name, overwrite=True)
    return picture_file(image, path, folder)


def picture_file(image: Image, path: Path, folder: Path) -> document.PictureFile:
    """Describe a picture that was written into the folder."""
    import hashlib

    return document.PictureFile(
        file=str(path.relative_to(folder)),
        width=image.width,
        height=image.height,
        bytes=path.stat().st_size,
        pixels_sha256=hashlib.sha256(image.tobytes()).hexdigest(),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
