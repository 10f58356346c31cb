"""`danqing report`: measures all of it once, and writes it up; or compares two such reports."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from danqing.atomic import write_whole
from danqing.cli.generate import Printer, open_engine, open_weights
from danqing.cli.scratch import scratch_folder
from danqing.cli.terminal import print_json
from danqing.cli.verify import (
    ANY,
    check_rung,
    in_another_process,
    judge_switches,
    opener,
    parity_baseline,
    trace_at,
    with_request_of,
)
from danqing.errors import OutputError
from danqing.files import expand
from danqing.report import collect, document
from danqing.report.changes import changes
from danqing.report.document import read_report
from danqing.report.views import markdown, page
from danqing.report.words import LANGUAGES
from danqing.request import Request, Resolved
from danqing.verify.determinism import check_determinism, measure_cost
from danqing.verify.parity import RUNGS, judge
from danqing.verify.sanity import look_at

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from danqing.cli.verify import TraceJob
    from danqing.engine import Engine
    from danqing.generation import Picture
    from danqing.report.changes import Change

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    """What a report is asked for.

    Attributes:
        job: prompt, weights, device, settings.
        prompted: the prompt was typed, not filled in.
        out: the folder it is written into.
        reference: a device, a trace's file, or `none`.
        edit: what to do with the picture, as a second case; None for no such case.
        repeats: pictures timed.
        batch: size of the batch that is tried; 0 for none.
        cost: measure deterministic kernels.
        process: repeat in another process.
        switches: judge the switches of memory and speed.
        require: the rung that parity must reach.
        lpips: weights of LPIPS, to measure that, too.
        quiet: no plan and no progress.
    """

    job: TraceJob
    prompted: bool
    out: Path
    reference: str
    edit: str | None
    repeats: int
    batch: int
    cost: bool
    process: bool
    switches: bool
    require: str
    lpips: Path | None
    quiet: bool


def run(asked: ReportJob) -> bool:
    """Measure, write everything into the folder, and return whether all verdicts passed."""
    check_rung(asked.require, RUNGS)
    _make_folder(asked.out)
    if (trace := trace_at(asked.reference)) is not None:
        job = with_request_of(asked.job, trace, prompted=asked.prompted)
        asked = replace(asked, job=job, prompted=True)
    case, engine_facts = _case(asked, asked.job, "text to image")
    cases = [case]
    if asked.edit is not None:
        painted = str(asked.out / case.picture.file)
        job = replace(
            asked.job, prompt=asked.edit, settings={**asked.job.settings, "image": [painted]}
        )
        # a trace is of one picture: what is done with it is compared with the CPU here
        reference = asked.reference if trace is None else "cpu"
        cases.append(_case(replace(asked, reference=reference), job, "edit")[0])
    found = document.Report(
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(["danqing", *sys.argv[1:]]),
        passed=all(_passed(one) for one in cases),
        cases=cases,
        **engine_facts,
    )
    write(found, asked.out)
    _print(found, asked)
    return found.passed or asked.require == ANY


def write(found: document.Report, folder: Path) -> None:
    """Write the report's JSON and its views, each whole or not at all."""
    _write(folder / "report.json", found.model_dump_json(indent=1) + "\n")
    for language in LANGUAGES:
        name = "report.md" if language == "en" else f"report.{language}.md"
        _write(folder / name, markdown(found, language))
    _write(folder / "report.html", page(found, folder))


def run_views(place: str) -> bool:
    """Write the views of a report again, from its JSON; return whether its verdicts passed."""
    path = expand(place)
    found = read_report(path)
    write(found, path.parent)
    print(path.parent / "report.html")
    return found.passed


def run_comparison(before: str, after: str, *, as_json: bool) -> bool:
    """Print what changed between two reports; return whether no verdict got worse."""
    found = changes(*(read_report(expand(place)) for place in (before, after)))
    if as_json:
        print_json([asdict(one) for one in found], indent=1)
    else:
        for one in found:
            print(_change(one))
        print("nothing changed" if not found else f"{len(found)} changes")
    return not any(one.worse for one in found)


# --- one case ------------------------------------------------------------------------------------


def _case(asked: ReportJob, job: TraceJob, name: Any) -> tuple[document.Case, dict[str, Any]]:
    say = Printer(quiet=asked.quiet, as_json=False)
    prefix = name.replace(" ", "-")
    checkpoint = open_weights(job.model_path, job.opening.components, allow_pt=False)
    with scratch_folder() as scratch:
        with open_engine(checkpoint, job.opening) as engine:
            say.plan(engine)
            settings = dict(job.settings)
            asked_for = Request(prompt=job.prompt, **settings)
            request = engine.spec.resolve(asked_for)
            job = replace(job, settings={**settings, "seed": request.seed})
            say.note(f"{name}: timing")
            first, timed = _paint(engine, request, asked.repeats)
            record = first.record()
            facts = _facts(engine, record)
            flops = engine.step_flops(request)
            peak = engine.device.peak_flops(engine.plan.dtype)
            timing = collect.timing(first, timed, step_flops=flops, peak_flops=peak)
            say.note(f"{name}: the same again")
            repeats = check_determinism(
                engine,
                request,
                folder=scratch,
                in_another_process=_elsewhere(job, request, engine) if asked.process else None,
                batch=asked.batch,
            )
            taken = [*_typed(request), *job.arguments()]
        cost = measure_cost(opener(job), request) if asked.cost else None
        path = first.save(asked.out / f"{prefix}.png", overwrite=True)
        parity, switches = _against(asked, job, scratch, prefix, say)
    return (
        document.Case(
            name=name,
            command=shlex.join(["danqing", "generate" if name != "edit" else "edit", *taken]),
            request=record["request"],
            notes=[*request.notes, *first.notes],
            picture=collect.picture_file(first.image, path, asked.out),
            timing=timing,
            sanity=collect.looked_at(look_at(first.image)),
            determinism=collect.repeated(repeats, cost),
            parity=parity,
            switches=switches,
        ),
        facts,
    )


def _paint(engine: Engine, request: Resolved, repeats: int) -> tuple[Picture, list[Picture]]:
    """Paint once with loading, then as often as is timed; nothing of the prompt is reused."""
    (first,) = engine.generate(request).pictures
    timed: list[Picture] = []
    for _ in range(repeats):
        engine.forget()
        timed.extend(engine.generate(request).pictures)
    return first, timed


def _facts(engine: Engine, record: Mapping[str, Any]) -> dict[str, Any]:
    from danqing.processor import cpu_model

    return {
        "environment": collect.environment(record, processor=cpu_model()),
        "model": collect.model(record, engine.plan.as_dict()),
        "parameters": _parameters(engine),
        "harmless_warnings": dict(engine.device.harmless_warnings),
    }


def _parameters(engine: Engine) -> list[document.Parameter]:
    from danqing.cli.options import flags, setting_names

    spec = engine.spec
    rows = [
        ("model_path", "--model-path", "pocket", "the weights"),
        ("device", "--device", "auto", "auto, cpu, cuda[:i], npu[:i], xpu[:i] or mps"),
        ("dtype", "--dtype", "auto", "auto, bfloat16, float16 or float32"),
        ("output_image", "--output-image", "{model}-{seed}.png", "where the picture goes"),
    ]
    for name in setting_names():
        if name in spec.no_effect:
            continue
        default = spec.defaults.get(name)
        meaning = Request.model_fields[name].description or ""
        rows.append((name, flags(name)[0], "-" if default is None else str(default), meaning))
    return [
        document.Parameter(name=name, flag=flag, default=default, meaning=meaning)
        for name, flag, default, meaning in rows
    ]


def _elsewhere(job: TraceJob, request: Resolved, engine: Engine) -> Callable[[Path], Any]:
    return lambda place: in_another_process(job, request, place, threads=engine.device.threads)


def _against(
    asked: ReportJob, job: TraceJob, folder: Path, prefix: str, say: Printer
) -> tuple[document.Parity | None, list[document.Switch]]:
    """Judge against the reference, and the switches against the run without them."""
    if asked.reference == NONE and not asked.switches:
        return None, []
    parity = None
    if asked.reference != NONE:
        say.note(f"{prefix}: against {asked.reference}")
        baseline, opened = parity_baseline(
            job, asked.reference, folder, prompted=asked.prompted, quiet=True
        )
        parity = collect.judged(
            judge(baseline, opened),
            required=asked.require,
            lpips=asked.lpips,
            from_trace=trace_at(asked.reference) is not None,
            folder=asked.out,
            prefix=prefix,
        )
    if not asked.switches:
        return parity, []
    say.note(f"{prefix}: the switches")
    return parity, collect.switched(judge_switches(job, folder))


def _typed(request: Resolved) -> list[str]:
    """Return the arguments that paint this picture, its settings spelled out."""
    words = [image.record()["path"] or image.name for image in request.image]
    words.append(request.prompt)
    for name, value in request.request.model_dump().items():
        if name not in ("prompt", "image") and value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _passed(case: document.Case) -> bool:
    parity = case.parity is None or case.parity.passed
    return case.determinism.passed and case.sanity.passed and parity


# --- files and words -----------------------------------------------------------------------------


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            "the report's folder cannot be made", seen=f"{folder}: {error.strerror or error}"
        ) from error


def _write(path: Path, text: str) -> None:
    try:
        with write_whole(path) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise OutputError(
            "the report cannot be written", seen=f"{path}: {error.strerror or error}"
        ) from error


def _print(found: document.Report, asked: ReportJob) -> None:
    if not asked.quiet:
        for case in found.cases:
            rung = "not judged" if case.parity is None else case.parity.rung or "DIFFERENT"
            again = "deterministic" if case.determinism.passed else "NOT DETERMINISTIC"
            each = case.timing.seconds_per_step
            print(f"{case.name}: {again}; {rung}; {each:.3f} s a step", file=sys.stderr)
    print(asked.out / "report.html")


def _change(one: Change) -> str:
    ratio = f" ({one.ratio:.2f} times)" if one.ratio is not None else ""
    return f"{one.where}: {_short(one.before)} -> {_short(one.after)}{ratio}" + (
        "  WORSE" if one.worse else ""
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
