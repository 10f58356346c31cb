"""`danqing trace` and `danqing verify`: what a run computed, and whether it is the same again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.cli.generate import Opening, Printer, open_engine, open_weights, read_components
from danqing.cli.options import setting_names
from danqing.errors import DanqingError, RequestError
from danqing.plan import size
from danqing.request import Request
from danqing.verify.determinism import check_determinism, record
from danqing.verify.joints import compare_traces
from danqing.verify.parity import RUNGS, check_parity, report
from danqing.verify.trace import Trace, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from danqing.verify.determinism import Determinism
    from danqing.verify.joints import Compared, Comparison
    from danqing.verify.metrics import Difference
    from danqing.verify.parity import Parity

FAILED = 1
ANY = "any"


@dataclass(frozen=True, kw_only=True)
class TraceJob:
    """What to run, and where."""

    prompt: str
    model_path: str
    components: Sequence[str]
    device: str
    dtype: str
    placement: str
    settings: Mapping[str, Any]

    @property
    def opening(self) -> Opening:
        """How the engine is opened."""
        return Opening(
            model_path=self.model_path,
            device=self.device,
            dtype=self.dtype,
            components=read_components(self.components),
            placement=self.placement,
        )

    def arguments(self) -> list[str]:
        """Return the flags that run the same in another process."""
        flags = ["--model-path", self.model_path, "--device", self.device, "--dtype", self.dtype]
        flags += ["--placement", self.placement]
        for text in self.components:
            flags += ["--component", text]
        return flags


def trace_job(prompt: str, device: str, given: Mapping[str, Any]) -> TraceJob:
    """Return the job that a command's flags describe."""
    return TraceJob(
        prompt=prompt,
        model_path=given["model_path"],
        components=given["component"] or [],
        device=device,
        dtype=given["dtype"],
        placement=given["placement"],
        settings={name: given[name] for name in setting_names() if given[name] is not None},
    )


def run_trace(job: TraceJob, out: str, *, digests: bool, quiet: bool) -> None:
    """Run once, and write what was seen."""
    with _opened(job, quiet=quiet) as engine:
        request = _one(engine.resolve(engine.with_seed(_request(job)))[0])
        trace = record(engine, request, Path(out).expanduser(), digests=digests)
    if not quiet:
        bytes_written = trace.path.stat().st_size
        print(f"{len(trace.joints)} tensors, {size(bytes_written)}", file=sys.stderr)
    print(out)


def run_determinism(
    job: TraceJob, *, batch: int, process: bool, require: str, as_json: bool, quiet: bool
) -> bool:
    """Run again and again; print what was found, and return whether it passed."""
    _check_rung(require)
    with _opened(job, quiet=quiet or as_json) as engine, tempfile.TemporaryDirectory() as folder:
        request = _one(engine.resolve(engine.with_seed(_request(job)))[0])

        def elsewhere(place: Path) -> Trace:
            return _in_another_process(job, request, place, threads=engine.threads)

        found = check_determinism(
            engine,
            request,
            folder=Path(folder),
            in_another_process=elsewhere if process else None,
            batch=batch,
        )
        if as_json:
            print(json.dumps(_determinism_report(found), ensure_ascii=False, indent=1))
        else:
            for line in _determinism_lines(found):
                print(line)
    return found.passed or require == ANY


def run_traces(candidate: str, reference: str, *, require: str, as_json: bool) -> bool:
    """Compare two traces; print what was found, and return whether it passed."""
    _check_rung(require)
    traces = [read_trace(Path(place).expanduser()) for place in (candidate, reference)]
    found = compare_traces(*traces)
    if as_json:
        print(json.dumps(_comparison_report(found), ensure_ascii=False, indent=1))
    else:
        for line in _comparison_lines(found, traces):
            print(line)
    return found.identical or require == ANY


def run_parity(job: TraceJob, reference: str, *, require: str, as_json: bool, quiet: bool) -> bool:
    """Compare a device with another; print the verdict, and return whether it passed."""
    _check_rung(require, RUNGS)
    checkpoint = open_weights(job.model_path, job.opening.components, allow_pt=False)

    def opened(device: str, dtype: str, placement: str) -> Callable[[], Any]:
        opening = replace(job.opening, device=device, dtype=dtype, placement=placement)
        return lambda: open_engine(checkpoint, opening)

    with open_engine(checkpoint, job.opening) as engine:
        Printer(quiet=quiet or as_json, as_json=False).plan(engine)
        request = _one(engine.resolve(engine.with_seed(_request(job)))[0])
        dtype = engine.plan.dtype
    with tempfile.TemporaryDirectory() as folder:
        found = check_parity(
            exact=opened("cpu", "float32", "auto"),
            reference=opened(reference, dtype, "auto"),
            candidate=opened(job.device, dtype, job.placement),
            request=request,
            folder=Path(folder),
        )
        if as_json:
            print(json.dumps(report(found), ensure_ascii=False, indent=1))
        else:
            for line in _parity_lines(found):
                print(line)
    return require == ANY or found.reaches(require)


def _check_rung(require: str, rungs: Sequence[str] = ("identical",)) -> None:
    if require not in (*rungs, ANY):
        allowed = ", ".join([*rungs, ANY])
        raise RequestError("there is no such requirement", seen=require, allowed=allowed)


def _opened(job: TraceJob, *, quiet: bool) -> Any:
    checkpoint = open_weights(job.model_path, job.opening.components, allow_pt=False)
    engine = open_engine(checkpoint, job.opening)
    Printer(quiet=quiet, as_json=False).plan(engine)
    return engine


def _request(job: TraceJob) -> Request:
    return Request(prompt=job.prompt, **job.settings)


def _one(request: Request) -> Request:
    if request.num_images_per_prompt != 1:
        raise RequestError(
            "one picture at a time is looked into", seen=request.num_images_per_prompt, allowed="1"
        )
    return request


def _in_another_process(
    job: TraceJob, request: Request, place: Path, *, threads: int | None
) -> Trace:
    """Run the same request in a new process; its settings are all spelled out.

    With as many threads as here: on a CPU their number may change the last bits.
    """
    settings = {k: v for k, v in request.model_dump().items() if v is not None and k != "prompt"}
    flags: list[str] = []
    for name, value in settings.items():
        values = [image["path"] for image in value] if name == "image" else [value]
        for one in values:
            flags += [f"--{name.replace('_', '-')}", str(one)]
    flags += [*job.arguments(), "--out", str(place), "-q", "--", request.prompt]
    child = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "danqing", "trace", *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})},
    )
    if child.returncode:
        raise DanqingError(
            "the other process failed", seen=child.stderr.strip()[-500:] or child.returncode
        )
    return read_trace(place)


# --- words ---------------------------------------------------------------------------------------


def _determinism_lines(found: Determinism) -> Iterator[str]:
    origin = found.first.about["provenance"]
    yield f"{origin['model']['title']} on {origin['device']['name']} in {origin['dtype']}"
    for repeat in found.repeats:
        joints = repeat.comparison.joints
        what = f"identical, {len(joints)} tensors"
        if (bad := repeat.comparison.first_divergence) is not None:
            what = f"DIFFERENT from {bad.name} on{_apart(bad)}"
        yield f"{repeat.way:<24} {what} ({repeat.seconds:.2f} s)"
    if found.batch is not None:
        count, largest = found.batch
        how = "the same bits" if not largest else f"a largest pixel difference of {largest}"
        yield f"{f'in a batch of {count}':<24} {how} (told, not judged)"
    yield "deterministic" if found.passed else "NOT DETERMINISTIC"


def _parity_lines(found: Parity) -> Iterator[str]:
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
    yield f"picture    {_seen(found.picture)}; precision alone: {_seen(found.precision)}"
    for line in found.search:
        yield f"search     {line}"
    if found.culprit:
        yield f"culprit    {found.culprit}"
    yield found.rung or "DIFFERENT"


def _seen(difference: Difference) -> str:
    psnr = "identical" if difference.largest == 0 else f"{difference.psnr:.2f} dB"
    return f"{psnr}, SSIM {difference.ssim:.5f}, largest {difference.largest}"


def _comparison_lines(found: Comparison, traces: Sequence[Trace]) -> Iterator[str]:
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


def _comparison_report(found: Comparison) -> dict[str, Any]:
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


def _determinism_report(found: Determinism) -> dict[str, Any]:
    return {
        "passed": found.passed,
        "repeats": [
            {"way": repeat.way, "seconds": repeat.seconds, **_comparison_report(repeat.comparison)}
            for repeat in found.repeats
        ],
        "batch": None
        if found.batch is None
        else {"size": found.batch[0], "max_pixel_difference": found.batch[1]},
        **found.first.about,
    }
