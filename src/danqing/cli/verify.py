"""`danqing trace` and `danqing verify`: what a run computed, and whether it is the same again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from danqing.cli.generate import (
    Opening,
    Printer,
    open_engine,
    open_weights,
    read_components,
    read_memory,
)
from danqing.cli.options import setting_names
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
from danqing.devices import OWN_ATTENTION
from danqing.errors import DanqingError, RequestError, TraceError, UntrustedRecordError
from danqing.files import expand
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
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from danqing.verify.invariance import Switch
    from danqing.verify.parity import Baseline

FAILED = 1
ANY = "any"
DEPTHS = ("joint", "block", "module")
SAMPLE = 4096
"""Values kept of each tensor from inside a network."""
SWITCHES: tuple[dict[str, Any], ...] = (
    {"placement": "resident"},
    {"placement": "staged"},
    {"placement": "streamed"},
    {"attention": "math"},
    {"attention": "flash"},
    {"attention": "efficient"},
    {"attention": "cudnn"},
    *({"attention": name} for name in OWN_ATTENTION),
    {"attention": "torch"},
    {"deterministic": True},
)
"""Each switch by itself, against the run as asked for."""
DESCRIBED = 400
"""Bytes that name one tensor in the header, about."""


@dataclass(frozen=True, kw_only=True)
class TraceJob:
    """What to run, and where."""

    prompt: str
    model_path: str
    components: Sequence[str]
    device: str
    dtype: str
    placement: str
    memory: str | None
    tile: str
    quantise: str
    attention: str
    deterministic: bool
    compile_with: str
    fused: str
    place: Sequence[str]
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
            memory=read_memory(self.memory),
            tile=self.tile,
            quantise=self.quantise,
            attention=self.attention,
            deterministic=self.deterministic,
            compile_with=self.compile_with,
            fused=self.fused,
            place=read_components(self.place, "--place", "NAME=DEVICE"),
        )

    def arguments(self) -> list[str]:
        """Return the flags that run the same in another process."""
        flags = ["--model-path", self.model_path, "--device", self.device, "--dtype", self.dtype]
        flags += ["--placement", self.placement, "--attention", self.attention]
        flags += ["--quantise", self.quantise] if self.quantise != "off" else []
        flags += ["--tile", self.tile] if self.tile != "auto" else []
        flags += ["--memory", self.memory] if self.memory is not None else []
        flags += ["--deterministic"] if self.deterministic else []
        flags += ["--compile", self.compile_with] if self.compile_with != "off" else []
        for text in self.components:
            flags += ["--component", text]
        flags += ["--fused", self.fused] if self.fused != "auto" else []
        for text in self.place:
            flags += ["--place", text]
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
        memory=given["memory"],
        tile=given["tile"],
        quantise=given["quantise"],
        attention=given["attention"],
        deterministic=given["deterministic"],
        compile_with=given["compile_with"],
        fused=given["fused"],
        place=given["place"] or [],
        settings={name: given[name] for name in setting_names() if given[name] is not None},
    )


def run_trace(job: TraceJob, out: str, *, digests: bool, depth: str, quiet: bool) -> None:
    """Run once, and write what was seen; say beforehand how much it will be."""
    if depth not in DEPTHS:
        raise RequestError("there is no such depth", seen=depth, allowed=", ".join(DEPTHS))
    with _opened(job, quiet=quiet) as engine:
        request = _one(engine.spec.resolve(_request(job)))
        wanted = _layers(engine, depth)
        if not quiet:
            expected = _expected(engine, request, wanted, digests=digests)
            print(f"trace      {expected}: {out}", file=sys.stderr)
        trace = record(
            engine,
            request,
            expand(out),
            digests=digests,
            inside=(lambda component, path, _: path in wanted[component]) if wanted else None,
            sample=SAMPLE,
        )
    if not quiet:
        bytes_written = trace.path.stat().st_size
        print(f"{len(trace.joints)} tensors, {size(bytes_written)}", file=sys.stderr)
    print(out)


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


def run_determinism(
    job: TraceJob,
    *,
    batch: int,
    process: bool,
    cost: bool,
    require: str,
    as_json: bool,
    quiet: bool,
) -> bool:
    """Run again and again; print what was found, and return whether it passed."""
    check_rung(require)
    with _opened(job, quiet=quiet or as_json) as engine, scratch_folder() as folder:
        request = _one(engine.spec.resolve(_request(job)))

        def elsewhere(place: Path) -> Trace:
            return in_another_process(job, request, place, threads=engine.device.threads)

        found = check_determinism(
            engine,
            request,
            folder=folder,
            in_another_process=elsewhere if process else None,
            batch=batch,
        )
    price = measure_cost(opener(job), request) if cost else None
    if as_json:
        told = {**determinism_report(found), "cost": None if price is None else asdict(price)}
        print_json(told, indent=1)
    else:
        for line in [*determinism_lines(found), *cost_lines(price)]:
            print(line)
    return found.passed or require == ANY


def run_traces(candidate: str, reference: str, *, require: str, as_json: bool) -> bool:
    """Compare two traces; print what was found, and return whether it passed."""
    check_rung(require)
    traces = [_read_trace(expand(place)) for place in (candidate, reference)]
    found = compare_traces(*traces)
    if as_json:
        print_json(comparison_report(found), indent=1)
    else:
        for line in comparison_lines(found, traces):
            print(line)
    return found.identical or require == ANY


def opener(job: TraceJob) -> Callable[[bool], Any]:
    """Return what opens a job's engine, with deterministic kernels only if told so."""
    checkpoint = open_weights(job.model_path, job.opening.components, allow_pt=False)
    return lambda asked: open_engine(checkpoint, replace(job.opening, deterministic=asked))


def run_parity(
    job: TraceJob,
    reference: str,
    *,
    prompted: bool,
    lpips: str | None,
    require: str,
    as_json: bool,
    quiet: bool,
) -> bool:
    """Compare a device with another; print the verdict, and return whether it passed."""
    check_rung(require, RUNGS)
    with scratch_folder() as folder:
        baseline, opened = parity_baseline(
            job, reference, folder, prompted=prompted, quiet=quiet or as_json
        )
        found = judge(baseline, opened)
    away = None
    if lpips is not None:
        away = measure_lpips(found.candidate.image, found.image, expand(lpips))
    if as_json:
        print_json({**report(found), "lpips": away}, indent=1)
    else:
        for line in parity_lines(found, lpips=away):
            print(line)
    return require == ANY or found.reaches(require)


def parity_baseline(
    job: TraceJob, reference: str, folder: Path, *, prompted: bool, quiet: bool
) -> tuple[Baseline, Callable[[], Any]]:
    """Run the reference, a device or a trace; return it, and what opens the candidate.

    Args:
        job: the candidate's; where the reference is a trace, the request is the trace's.
        reference: a device, or a trace's file.
        folder: for traces.
        prompted: the job's prompt was typed, not filled in.
        quiet: print no plan.
    """
    checkpoint = open_weights(job.model_path, job.opening.components, allow_pt=False)

    def opened(device: str, dtype: str) -> Callable[[], Any]:
        return lambda: open_engine(checkpoint, _plain(job, device, dtype))

    trace = trace_at(reference)
    if trace is not None:
        job = with_request_of(job, trace, prompted=prompted)
    with open_engine(checkpoint, job.opening) as engine:
        Printer(quiet=quiet, as_json=False).plan(engine)
        request = _one(engine.spec.resolve(_request(job)))
        dtype = engine.plan.dtype
        if trace is not None:
            _check_weights(trace, engine.checkpoint.fingerprint)
    exact = opened("cpu", "float32")
    judged = replace(job.opening, dtype=dtype)

    def candidate() -> Any:
        return open_engine(checkpoint, judged)

    if trace is None:
        there = opened(reference, dtype)
        return prepare(exact, there, request=request, folder=folder), candidate
    here = opened("cpu", dtype)
    return prepare_from_trace(trace, exact, here, request=request, folder=folder), candidate


def with_request_of(job: TraceJob, trace: Trace, *, prompted: bool) -> TraceJob:
    """Return a job that runs a trace's request, in its dtype unless another was asked for."""
    request = request_of(trace, job, prompted=prompted)
    fields = {name: getattr(request, name) for name in setting_names()}
    return replace(
        job,
        prompt=request.prompt,
        settings={name: value for name, value in fields.items() if value is not None},
        dtype=str(trace.about["provenance"]["dtype"]) if job.dtype == "auto" else job.dtype,
    )


def trace_at(reference: str) -> Trace | None:
    """Open the reference if it is a file; a device's name is none."""
    place = expand(reference)
    return _read_trace(place) if place.is_file() or place.suffix == ".trace" else None


def _read_trace(place: Path) -> Trace:
    trace = read_trace(place)
    check_about(trace)
    return trace


def request_of(trace: Trace, job: TraceJob, *, prompted: bool) -> Request:
    """Return the trace's request; one that was typed must be the same."""
    request = Request(**_without_files(trace, job))
    typed = {**job.settings, **({"prompt": job.prompt} if prompted else {})}
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


def _without_files(trace: Trace, job: TraceJob) -> dict[str, Any]:
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


def switch_name(changes: Mapping[str, Any]) -> str:
    """Return a switch as a user would type it."""
    flags = {"compile_with": "compile"}
    return " ".join(
        f"--{flags.get(name, name)}" + ("" if value is True else f" {value}")
        for name, value in changes.items()
    )


def run_invariance(
    job: TraceJob, *, batch: int, compiled: bool, require: str, as_json: bool, quiet: bool
) -> bool:
    """Judge every switch; print the table, and return whether all passed."""
    check_rung(require, (*RUNGS[:2],))
    with scratch_folder() as folder:
        found = judge_switches(job, folder, batch=batch, compiled=compiled, quiet=quiet or as_json)
    if as_json:
        print_json([asdict(one) for one in found], indent=1)
    else:
        for line in switch_lines(found):
            print(line)
    enough = {"identical": {None, "identical"}, "close": {None, "identical", "close"}}
    judged = [one for one in found if not one.name.startswith("batch")]
    return require == ANY or all(one.rung in enough[require] for one in judged)


def judge_switches(
    job: TraceJob, folder: Path, *, batch: int = 2, compiled: bool = False, quiet: bool = True
) -> tuple[Switch, ...]:
    """Judge each switch that this device has against the job's own run."""
    checkpoint = open_weights(job.model_path, job.opening.components, allow_pt=False)
    with open_engine(checkpoint, job.opening) as engine:
        Printer(quiet=quiet, as_json=False).plan(engine)
        request = _one(engine.spec.resolve(_request(job)))
        off = [{"fused": "off"}] if engine.plan.fused else []
        switches = [*SWITCHES, *off, *({"fused": name} for name in engine.device.fused)]
        if compiled:
            switches += [
                {"compile_with": name} for name in engine.device.compilers if name != "off"
            ]

    def opened(opening: Opening) -> Callable[[], Any]:
        return lambda: open_engine(checkpoint, opening)

    exact = opened(_plain(job, "cpu", "float32"))
    baseline = prepare(exact, opened(job.opening), request=request, folder=folder)
    return check_invariance(
        baseline,
        {
            switch_name(changes): opened(replace(job.opening, **changes))
            for changes in switches
            if any(getattr(job.opening, name) != value for name, value in changes.items())
        },
        batch=batch,
    )


def _plain(job: TraceJob, device: str, dtype: str) -> Opening:
    """Return a job's weights on another device, without its switches."""
    return Opening(
        model_path=job.model_path,
        device=device,
        dtype=dtype,
        components=job.opening.components,
        attention="torch",
        fused="off",
    )


def check_rung(require: str, rungs: Sequence[str] = ("identical",)) -> None:
    """Refuse a requirement that is none."""
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


def _one(request: Resolved) -> Resolved:
    if request.num_images_per_prompt != 1:
        raise RequestError(
            "one picture at a time is looked into", seen=request.num_images_per_prompt, allowed="1"
        )
    return request


def in_another_process(
    job: TraceJob, request: Resolved, place: Path, *, threads: int | None
) -> Trace:
    """Run the same request in a new process; its settings are all spelled out.

    With as many threads as here: on a CPU their number may change the last bits.
    """
    asked = request.request.model_dump()
    settings = {k: v for k, v in asked.items() if v is not None and k != "prompt"}
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
