"""`danqing trace` and `danqing verify`: what a run computed, and whether it is the same again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from danqing.cli.jobs.flags import Probing
from danqing.cli.opening import open_engine, open_weights
from danqing.cli.options import arguments, flags, setting_names
from danqing.cli.painting import Printer
from danqing.cli.scratch import scratch_folder
from danqing.cli.terminal import print_json
from danqing.cli.verdicts import (
    comparison_lines,
    comparison_report,
    cost_lines,
    determinism_lines,
    determinism_report,
    parity_lines,
    switch_lines,
)
from danqing.errors import DanqingError, RequestError, TraceError, UntrustedRecordError
from danqing.files import expand
from danqing.options import Options
from danqing.plan import ATTENTION
from danqing.quantities import size
from danqing.references import read_references
from danqing.request import Request, Resolved
from danqing.verify.determinism import check_determinism, measure_cost
from danqing.verify.invariance import check_invariance
from danqing.verify.joints import compare_traces
from danqing.verify.lpips import lpips as measure_lpips
from danqing.verify.parity import (
    RUNGS,
    is_block,
    judge,
    prepare,
    prepare_from_trace,
    report,
)
from danqing.verify.runs import record
from danqing.verify.trace import Trace, check_about, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from danqing.cli.jobs.trace import Tracing
    from danqing.cli.jobs.verify import Comparing, Repeating, Switching, Traces
    from danqing.engine import Engine
    from danqing.verify.invariance import Switch
    from danqing.verify.parity import Baseline

ANY = "any"
DEPTHS = ("joint", "block", "module")
SAMPLE = 4096
"""Values kept of each tensor from inside a network."""
DESCRIBED = 400
"""Bytes that name one tensor in the header, about."""
Asked = TypeVar("Asked", bound=Probing)


def run_trace(job: Tracing) -> None:
    """Run once, and write what was seen; say beforehand how much it will be."""
    if job.depth not in DEPTHS:
        raise RequestError("unknown depth", seen=job.depth, allowed=", ".join(DEPTHS))
    with _opened(job, quiet=job.quiet) as engine:
        request = _one(engine.spec.resolve(job.request()))
        wanted = _layers(engine, job.depth)
        if not job.quiet:
            expected = _expected(engine, request, wanted, digests=job.digests)
            print(f"trace      {expected}: {job.out}", file=sys.stderr)
        trace = record(
            engine,
            request,
            expand(job.out),
            digests=job.digests,
            inside=(lambda component, path, _: path in wanted[component]) if wanted else None,
            sample=SAMPLE,
        )
    if not job.quiet:
        bytes_written = trace.path.stat().st_size
        print(f"{len(trace.joints)} tensors, {size(bytes_written)}", file=sys.stderr)
    print(job.out)


def _layers(engine: Any, depth: str) -> dict[str, frozenset[str]]:
    """Return the paths of the layers to be sampled, by component."""
    if depth == "joint":
        return {}
    return {
        part.name: frozenset(
            path for path in engine.layers(part.name) if depth == "module" or is_block(path)
        )
        for part in engine.plan.components
    }


def _expected(
    engine: Any, request: Resolved, wanted: Mapping[str, frozenset[str]], *, digests: bool
) -> str:
    """Say how large the trace will be: exactly at the joints, at most inside."""
    at_joints = 0 if digests else engine.trace_bytes(request)
    if not wanted:
        return f"{size(at_joints)} of tensors"
    # a text encoder reads prompt and negative prompt, and every picture to edit
    others = 2 + len(request.image)
    calls = sum(
        len(paths) * (request.num_inference_steps if name in engine.stages["denoise"] else others)
        for name, paths in wanted.items()
    )
    each = DESCRIBED + (0 if digests else SAMPLE * 4)
    return f"{size(at_joints)} at the joints, and at most {size(2 * calls * each)} inside"


def run_determinism(job: Repeating) -> bool:
    """Run again and again; print the verdict, and return whether it passed."""
    check_rung(job.require)
    with _opened(job, quiet=job.quiet or job.as_json) as engine, scratch_folder() as folder:
        request = _one(engine.spec.resolve(job.request()))

        def elsewhere(place: Path) -> Trace:
            return in_another_process(job, request, place, threads=engine.device.threads)

        found = check_determinism(
            engine,
            request,
            folder=folder,
            in_another_process=elsewhere if job.process else None,
            batch=job.batch,
        )
    price = measure_cost(opener(job), request) if job.cost else None
    if job.as_json:
        told = {**determinism_report(found), "cost": None if price is None else asdict(price)}
        print_json(told, indent=1)
    else:
        for line in [*determinism_lines(found), *cost_lines(price)]:
            print(line)
    return found.passed or job.require == ANY


def run_traces(job: Traces) -> bool:
    """Compare two traces; print the comparison, and return whether it passed."""
    check_rung(job.require)
    traces = [_read_trace(expand(place)) for place in (job.candidate, job.reference)]
    found = compare_traces(*traces)
    if job.as_json:
        print_json(comparison_report(found), indent=1)
    else:
        for line in comparison_lines(found, traces):
            print(line)
    return found.identical or job.require == ANY


def opener(job: Probing) -> Callable[[bool], Any]:
    """Return what opens a job's engine, with deterministic kernels or without."""
    checkpoint = open_weights(job.model_path, job.options)
    return lambda asked: open_engine(checkpoint, job.options.replace(deterministic=asked))


def run_parity(job: Comparing) -> bool:
    """Compare a device with another; print the verdict, and return whether it passed."""
    check_rung(job.require, RUNGS)
    with scratch_folder() as folder:
        found = judge(*parity_baseline(job, job.reference, folder, quiet=job.quiet or job.as_json))
    away = None
    if job.lpips is not None:
        away = measure_lpips(found.candidate.image, found.image, expand(job.lpips))
    if job.as_json:
        print_json({**report(found), "lpips": away}, indent=1)
    else:
        for line in parity_lines(found, lpips=away):
            print(line)
    return job.require == ANY or found.reaches(job.require)


def parity_baseline(
    job: Probing, reference: str, folder: Path, *, quiet: bool
) -> tuple[Baseline, Callable[[], Any]]:
    """Run the reference, a device or a trace; return it, and what opens the candidate.

    Args:
        job: the candidate's; where the reference is a trace, the request is the trace's.
        reference: a device, or a trace's file.
        folder: for traces.
        quiet: print no plan.
    """
    checkpoint = open_weights(job.model_path, job.options)

    def opened(device: str, dtype: str) -> Callable[[], Any]:
        return lambda: open_engine(checkpoint, _plain(device, dtype))

    trace = trace_at(reference)
    if trace is not None:
        job = with_request_of(job, trace)
    with open_engine(checkpoint, job.options) as engine:
        Printer(quiet=quiet, as_json=False).plan(engine)
        request = _one(engine.spec.resolve(job.request()))
        dtype = engine.plan.dtype
        if trace is not None:
            _check_weights(trace, engine.checkpoint.fingerprint)
    exact = opened("cpu", "float32")
    judged = job.options.replace(dtype=dtype)

    def candidate() -> Any:
        return open_engine(checkpoint, judged)

    if trace is None:
        there = opened(reference, dtype)
        return prepare(exact, there, request=request, folder=folder), candidate
    here = opened("cpu", dtype)
    return prepare_from_trace(trace, exact, here, request=request, folder=folder), candidate


def with_request_of(job: Asked, trace: Trace) -> Asked:
    """Return a job that runs a trace's request, in its dtype unless another was asked for."""
    request = request_of(trace, job)
    fields = {name: getattr(request, name) for name in setting_names()}
    dtype = job.options.dtype
    if dtype == "auto":
        dtype = str(trace.about["provenance"]["dtype"])
    return job.replace(
        prompt=request.prompt,
        settings={name: value for name, value in fields.items() if value is not None},
        options=job.options.replace(dtype=dtype),
    )


def trace_at(reference: str) -> Trace | None:
    """Open the reference if it is a file; a device's name is none."""
    place = expand(reference)
    return _read_trace(place) if place.is_file() or place.suffix == ".trace" else None


def _read_trace(place: Path) -> Trace:
    trace = read_trace(place)
    check_about(trace)
    return trace


def request_of(trace: Trace, job: Probing) -> Request:
    """Return the trace's request; one that was typed must be the same."""
    request = Request(**_without_files(trace, job))
    typed = dict(job.settings) if job.prompt is None else {**job.settings, "prompt": job.prompt}
    for name, value in typed.items():
        recorded = getattr(request, name)
        if name != "image" and recorded != value:
            raise RequestError(
                f"the reference was made with another {name}",
                seen=value,
                allowed=str(recorded),
                hint=f"leave it out: it is taken from {trace.path}",
            )
    return request


def _without_files(trace: Trace, job: Probing) -> dict[str, Any]:
    """Return a trace's settings with the images named on the command line, not by the trace.

    Raises:
        UntrustedRecordError: images were edited, and the command line does not name them.
        TraceError: other images are named.
    """
    settings = dict(trace.about["request"])
    recorded = settings.get("image")
    if not recorded:
        return settings
    named = job.settings.get("image")
    if named is None:
        raise UntrustedRecordError(
            "the trace names images that are not opened without consent",
            seen=str(recorded)[:200],
            hint="name them: --image FILE",
        )
    settings["image"] = images = read_references(named)
    if [one.pixels_sha256 for one in images] != _digests(recorded):
        raise TraceError("the reference was made with other images", seen=str(named)[:200])
    return settings


def _digests(images: Any) -> list[Any]:
    rows = images if isinstance(images, list) else []
    return [row.get("pixels_sha256") if isinstance(row, dict) else None for row in rows]


def _check_weights(trace: Trace, fingerprint: str) -> None:
    made_with = str(trace.about["provenance"]["model"]["fingerprint"])
    if made_with != fingerprint:
        raise TraceError(
            "the reference was made with other weights",
            seen=f"fingerprint {fingerprint[:16]}",
            allowed=f"fingerprint {made_with[:16]}: {trace.about['provenance']['model']['title']}",
            hint="name the same files with --model-path",
        )


def run_invariance(job: Switching) -> bool:
    """Judge every switch; print the table, and return whether all passed."""
    check_rung(job.require, (*RUNGS[:2],))
    with scratch_folder() as folder:
        found = judge_switches(
            job, folder, batch=job.batch, compiled=job.compiled, quiet=job.quiet or job.as_json
        )
    if job.as_json:
        print_json([asdict(one) for one in found], indent=1)
    else:
        for line in switch_lines(found):
            print(line)
    enough = {"identical": {None, "identical"}, "close": {None, "identical", "close"}}
    judged = [one for one in found if not one.name.startswith("batch")]
    return job.require == ANY or all(one.rung in enough[job.require] for one in judged)


def judge_switches(
    job: Probing, folder: Path, *, batch: int = 2, compiled: bool = False, quiet: bool = True
) -> tuple[Switch, ...]:
    """Judge each switch that this device has against the job's own run."""
    checkpoint = open_weights(job.model_path, job.options)
    with open_engine(checkpoint, job.options) as engine:
        Printer(quiet=quiet, as_json=False).plan(engine)
        request = _one(engine.spec.resolve(job.request()))
        switches = [*_switches(engine, compiled=compiled)]

    def opened(options: Options) -> Callable[[], Any]:
        return lambda: open_engine(checkpoint, options)

    baseline = prepare(
        opened(_plain("cpu", "float32")), opened(job.options), request=request, folder=folder
    )
    return check_invariance(
        baseline,
        {
            " ".join(arguments(Options(**switch))): opened(job.options.replace(**switch))
            for switch in switches
            if job.options.replace(**switch) != job.options
        },
        batch=batch,
    )


def _switches(engine: Engine, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """Yield each choice of the options that must not change the image, one at a time."""
    choices: dict[str, Iterable[Any]] = {
        "attention": ATTENTION,
        "deterministic": (True,),
        "fused": (*(("off",) if engine.plan.fused else ()), *engine.device.fused),
        "compile": engine.device.compilers if compiled else (),
    }
    for name, field in Options.model_fields.items():
        extra: Any = field.json_schema_extra or {}
        if not extra.get("switch"):
            continue
        for value in choices.get(name) or get_args(field.annotation):
            if value not in ("auto", field.default):
                yield {name: value}


def _plain(device: str, dtype: str) -> Options:
    """Return options of another device, with every switch off."""
    return Options(device=device, dtype=dtype, attention="torch", fused="off")


def check_rung(require: str, rungs: Sequence[str] = ("identical",)) -> None:
    """Refuse a requirement that is none."""
    if require not in (*rungs, ANY):
        allowed = ", ".join([*rungs, ANY])
        raise RequestError("unknown requirement", seen=require, allowed=allowed)


def _opened(job: Probing, *, quiet: bool) -> Engine:
    engine = open_engine(open_weights(job.model_path, job.options), job.options)
    Printer(quiet=quiet, as_json=False).plan(engine)
    return engine


def _one(request: Resolved) -> Resolved:
    if request.num_images_per_prompt != 1:
        raise RequestError(
            "one picture at a time is looked into", seen=request.num_images_per_prompt, allowed="1"
        )
    return request


def in_another_process(
    job: Probing, request: Resolved, place: Path, *, threads: int | None
) -> Trace:
    """Run the same request in a new process; its settings are all spelled out.

    With as many threads as here: on a CPU their number may change the last bits.
    """
    asked = request.request.model_dump()
    settings = {k: v for k, v in asked.items() if v is not None and k != "prompt"}
    words = ["--model-path", job.model_path, *arguments(job.options)]
    for name, value in settings.items():
        values = [image["path"] for image in value] if name == "image" else [value]
        for one in values:
            words += [flags(name)[0], str(one)]
    words += ["--out", str(place), "-q", "--", request.prompt]
    child = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "danqing", "trace", *words],
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
