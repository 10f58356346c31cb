"""`danqing report`: measures all of it once, and writes it up; or compares two such reports."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from danqing.atomic import write_whole
from danqing.cli.jobs.generate import DEFAULT_OUTPUT
from danqing.cli.opening import open_engine, open_weights
from danqing.cli.options import arguments, flags, setting_names
from danqing.cli.painting import Printer
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
from danqing.errors import NoEffectError, OutputError
from danqing.files import expand
from danqing.options import Options
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

    from danqing.cli.jobs.report import Reporting
    from danqing.engine import Engine
    from danqing.generation import Picture
    from danqing.report.changes import Change

NONE = "none"


def check_effect(job: Reporting) -> None:
    """Refuse flags that would change nothing."""
    if job.compare is not None or job.views is not None:
        typed = {"PROMPT": job.prompt, "--edit": job.edit, "--lpips": job.lpips}
        words = [*(name for name, value in typed.items() if value is not None), *job.settings]
        unused = [*words, *(flags(name, Options)[0] for name in job.options.typed)]
        if unused or (job.compare is not None and job.views is not None):
            raise NoEffectError(
                "--compare and --views run nothing, and stand alone",
                seen=", ".join(unused) or "both",
            )
    if job.as_json and job.compare is None:
        raise NoEffectError("--json has no effect without --compare: report.json is written anyway")


def run(job: Reporting) -> bool:
    """Measure, write everything into the folder, and return whether all verdicts passed."""
    check_rung(job.require, RUNGS)
    _make_folder(expand(job.out))
    if (trace := trace_at(job.reference)) is not None:
        job = with_request_of(job, trace)
    case, engine_facts = _case(job, "text to image")
    cases = [case]
    if job.edit is not None:
        # a trace is of one image: an edit of it is compared with the CPU here
        edit = job.replace(
            prompt=job.edit,
            settings={**job.settings, "image": [str(expand(job.out) / case.picture.file)]},
            reference=job.reference if trace is None else "cpu",
        )
        cases.append(_case(edit, "edit")[0])
    found = document.Report(
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(["danqing", *sys.argv[1:]]),
        passed=all(_passed(one) for one in cases),
        cases=cases,
        **engine_facts,
    )
    write(found, expand(job.out))
    _print(found, job)
    return found.passed or job.require == ANY


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


def _case(job: Reporting, name: Any) -> tuple[document.Case, dict[str, Any]]:
    say = Printer(quiet=job.quiet, as_json=False)
    prefix, out = name.replace(" ", "-"), expand(job.out)
    with scratch_folder() as scratch:
        with open_engine(open_weights(job.model_path, job.options), job.options) as engine:
            say.plan(engine)
            request = engine.spec.resolve(job.request())
            job = job.replace(settings={**job.settings, "seed": request.seed})
            say.note(f"{name}: timing")
            first, timed = _paint(engine, request, job.repeats)
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
                in_another_process=_elsewhere(job, request, engine) if job.process else None,
                batch=job.batch,
            )
            taken = [*_typed(request), "-m", job.model_path, *arguments(job.options)]
        cost = measure_cost(opener(job), request) if job.cost else None
        path = first.save(out / f"{prefix}.png", overwrite=True)
        parity, switches = _against(job, scratch, prefix, say)
    return (
        document.Case(
            name=name,
            command=shlex.join(["danqing", "generate" if name != "edit" else "edit", *taken]),
            request=record["request"],
            notes=[*request.notes, *first.notes],
            picture=collect.picture_file(first.image, path, out),
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
    spec = engine.spec
    rows = [("model_path", "--model-path", "pocket", "Weights.")]
    for name in ("device", "dtype"):
        option = Options.model_fields[name]
        rows.append((name, flags(name, Options)[0], option.default, option.description or ""))
    rows.append(("output_image", "--output-image", DEFAULT_OUTPUT, "Output file."))
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


def _elsewhere(job: Reporting, request: Resolved, engine: Engine) -> Callable[[Path], Any]:
    return lambda place: in_another_process(job, request, place, threads=engine.device.threads)


def _against(
    job: Reporting, folder: Path, prefix: str, say: Printer
) -> tuple[document.Parity | None, list[document.Switch]]:
    """Judge against the reference, and the switches against the run without them."""
    parity = None
    if job.reference != NONE:
        say.note(f"{prefix}: against {job.reference}")
        parity = collect.judged(
            judge(*parity_baseline(job, job.reference, folder, quiet=True)),
            required=job.require,
            lpips=None if job.lpips is None else expand(job.lpips),
            from_trace=trace_at(job.reference) is not None,
            folder=expand(job.out),
            prefix=prefix,
        )
    if not job.switches:
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


def _print(found: document.Report, job: Reporting) -> None:
    if not job.quiet:
        for case in found.cases:
            rung = "not judged" if case.parity is None else case.parity.rung or "DIFFERENT"
            again = "deterministic" if case.determinism.passed else "NOT DETERMINISTIC"
            each = case.timing.seconds_per_step
            print(f"{case.name}: {again}; {rung}; {each:.3f} s a step", file=sys.stderr)
    print(expand(job.out) / "report.html")


def _change(one: Change) -> str:
    ratio = f" ({one.ratio:.2f} times)" if one.ratio is not None else ""
    return f"{one.where}: {_short(one.before)} -> {_short(one.after)}{ratio}" + (
        "  WORSE" if one.worse else ""
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
