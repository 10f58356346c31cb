"""The command line: parse, call, print, exit code. Everything it can do, the library can do too."""

from __future__ import annotations

import codecs
import functools
import io
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from danqing.cli import terminal
from danqing.cli.options import request_options
from danqing.cli.painting import (
    AllowPtFlag,
    ComponentFlag,
    painting_options,
    probing_options,
    run_painting,
)
from danqing.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
EXIT_BUG = 1

# Names may be typed with underscores or dashes: --model_path is --model-path.
CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
}


class Commands(TyperGroup):
    """The commands; their output is escaped, and a failed write is an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; on a full disk or a closed output, exit as documented."""
        from danqing.errors import DanqingError

        with terminal.streams():
            try:
                try:
                    result = super().main(*args, **kwargs)
                except SystemExit as end:
                    if not end.code:
                        sys.stdout.flush()
                    raise
                sys.stdout.flush()
            except DanqingError as error:  # of --help and --version: commands are guarded
                print(f"danqing: error: {error}", file=sys.stderr)
                raise SystemExit(error.exit_code) from None
            return result


app = typer.Typer(
    name="danqing",
    cls=Commands,
    help="Run open image models from local weights on any PyTorch device.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"danqing {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Print an error the way users need it, and exit with its documented code."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        from danqing.errors import DanqingError

        try:
            command(*args, **kwargs)
        except DanqingError as error:
            if debug:
                traceback.print_exc()
            print(f"danqing: error: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            if debug:
                traceback.print_exc()
            print("danqing: interrupted", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # noqa: BLE001 - the last door: a bug must not look like a crash
            if debug:
                traceback.print_exc()
            hint = "" if debug else "; --debug shows where"
            what = f"{type(error).__name__}: {error}"
            print(f"danqing: this is a bug in danqing: {what}{hint}", file=sys.stderr)
            raise typer.Exit(EXIT_BUG) from None

    return run


JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@app.command()
@painting_options
@_guarded
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What the pictures show.")
    ] = None,
    **given: Any,
) -> None:
    """Paint pictures from prompts, from weights on this disk."""
    run_painting(prompts, [], given=given)


@app.command()
@painting_options
@_guarded
def edit(
    picture: Annotated[
        str, typer.Argument(metavar="PICTURE", help="What to edit; --image names further ones.")
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to do with it.")
    ] = None,
    **given: Any,
) -> None:
    """Edit a picture with a model that can; the same as generate with --image."""
    run_painting(prompts, [picture], given=given)


@app.command()
@request_options
@_guarded
def eval_set(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The benchmark; see --list.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Your copy of its prompts: a file, or a folder of such."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where its scorer finds the pictures; gone on with."),
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the pictures to edit lie.  [default: beside the prompts]",
        ),
    ] = None,
    file_name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="TEMPLATE",
            help="Name of each file, if the benchmark's has changed: {key}, {number}, {index}, "
            "and any field of a row.",
        ),
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Put before prompts whose row has no rules of its own."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N prompts.")
    ] = None,
    batch: Annotated[
        int, typer.Option(metavar="N", help="Pictures of a prompt computed together.")
    ] = 1,
    model_path: Annotated[
        str,
        typer.Option("--model-path", "-m", metavar="PLACE", help="The weights."),
    ] = "pocket",
    component: ComponentFlag = None,
    allow_pt: AllowPtFlag = False,
    device: Annotated[str, typer.Option(metavar="NAME", help="As in generate.")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="As in generate.")] = "auto",
    placement: Annotated[str, typer.Option(metavar="NAME", help="As in generate.")] = "auto",
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="As in generate.")] = None,
    known: Annotated[bool, typer.Option("--list", help="List the benchmarks.")] = False,
    json_report: JsonFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No plan and no progress.")] = False,
    **settings: Any,
) -> None:
    """Paint a benchmark's pictures into the folders its own scorer reads."""
    from danqing.cli.evalset import EvalJob, list_protocols, run
    from danqing.errors import RequestError

    if known:
        list_protocols(as_json=json_report)
        return
    if name is None or prompts is None or out is None:
        raise RequestError(
            "an eval set needs a name, prompts and a folder",
            allowed="danqing eval-set NAME --prompts FILE --out FOLDER, or --list",
        )
    run(
        EvalJob(
            name=name,
            prompts=prompts,
            out=out,
            pictures=pictures,
            file_name=file_name,
            rules=rules,
            limit=limit,
            batch=batch,
            model_path=model_path,
            components=component or [],
            allow_pt=allow_pt,
            device=device,
            dtype=dtype,
            placement=placement,
            memory=memory,
            quiet=quiet,
            settings={key: value for key, value in settings.items() if value is not None},
        )
    )


DeviceFlag = Annotated[
    str, typer.Option("--device", metavar="NAME", help="As in generate.  [default: auto]")
]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No plan and no progress.")]
RequireFlag = Annotated[
    str, typer.Option(metavar="RUNG", help="identical: exit with 1 if it is not; or any.")
]


@app.command()
@probing_options
@_guarded
def plan(
    prompt: Annotated[
        str, typer.Argument(metavar="[PROMPT]", help="What the picture would show.")
    ] = "a picture",
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures computed together.")] = 1,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Both at once: 768x512.")
    ] = None,
    device: DeviceFlag = "auto",
    json_report: JsonFlag = False,
    **given: Any,
) -> None:
    """Say what a run would do, and why: placement, memory, time. Nothing is loaded."""
    from danqing.cli import planning
    from danqing.cli.verify import trace_job

    planning.run(trace_job(prompt, device, given), size=size, batch=batch, as_json=json_report)


@app.command()
@probing_options
@_guarded
def trace(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shows.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="Where the trace goes.")],
    digests: Annotated[
        bool, typer.Option("--digests", help="Keep digests alone: a small file.")
    ] = False,
    depth: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="joint; or also a sample of what every block, or every module, gives.  "
            "[default: joint]",
        ),
    ] = "joint",
    device: DeviceFlag = "auto",
    quiet: QuietFlag = False,
    **given: Any,
) -> None:
    """Run once and keep the tensors at its joints, to be compared with another run's."""
    from danqing.cli.verify import run_trace, trace_job

    job = trace_job(prompt, device, given)
    run_trace(job, out, digests=digests, depth=depth, quiet=quiet)


@app.command()
@_guarded
def serve(
    model_path: Annotated[
        list[str] | None,
        typer.Option(
            "--model-path",
            "-m",
            metavar="PLACE",
            help="The weights; may be repeated: all are served.  [default: pocket]",
        ),
    ] = None,
    component: ComponentFlag = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="As in generate; may be repeated: a worker each.  [default: auto]"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Beyond loopback, keys are needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any free.")] = 8000,
    api_key_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Keys that are let in: `name key` or a key on each line."
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody in who can reach the address.")
    ] = False,
    journal: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Keep jobs there, so that they outlive a crash (SQLite)."
        ),
    ] = None,
    queue: Annotated[int, typer.Option(metavar="N", min=1, help="Jobs that may wait.")] = 64,
    per_client: Annotated[
        int, typer.Option(metavar="N", min=1, help="Jobs of one key that may wait or run.")
    ] = 16,
    max_side: Annotated[
        int, typer.Option(metavar="N", min=64, max=16384, help="Pixels of a side; planned for.")
    ] = 1024,
    max_steps: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="Steps of a picture.")
    ] = 100,
    deadline: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="From acceptance to the last picture.")
    ] = 600.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="To finish what runs, when stopped.")
    ] = 30.0,
    safety_checker: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="An image classifier that says what is not shown."),
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="A page for people at /.")] = True,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts into the log, too.")
    ] = False,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="As in generate.")] = "auto",
    placement: Annotated[str, typer.Option(metavar="NAME", help="As in generate.")] = "auto",
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="As in generate.")] = None,
    quantise: Annotated[str, typer.Option(metavar="NAME", help="As in generate.")] = "off",
    attention: Annotated[str, typer.Option(metavar="NAME", help="As in generate.")] = "auto",
    fused: Annotated[str, typer.Option(metavar="NAMES", help="As in generate.")] = "auto",
    compile_with: Annotated[
        str, typer.Option("--compile", metavar="NAME", help="As in generate.")
    ] = "off",
    prompt_cache: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="As in generate.")
    ] = None,
    quiet: QuietFlag = False,
) -> None:
    """Serve pictures: the images API that clients already speak, and a page."""
    from danqing.cli.serving import ServeJob, run

    run(
        ServeJob(
            model_path=model_path or [],
            components=component or [],
            devices=device or ["auto"],
            dtype=dtype,
            placement=placement,
            memory=memory,
            quantise=quantise,
            attention=attention,
            fused=fused,
            compile_with=compile_with,
            prompt_cache=prompt_cache,
            host=host,
            port=port,
            api_key_file=api_key_file,
            no_auth=no_auth,
            journal=journal,
            queue=queue,
            per_client=per_client,
            max_side=max_side,
            max_steps=max_steps,
            deadline=deadline,
            grace=grace,
            safety_checker=safety_checker,
            page=page,
            log_prompts=log_prompts,
            quiet=quiet,
        )
    )


LOOKED_AT = "three blue mountains under a red sun, a boat on the water"

verify = typer.Typer(
    name="verify",
    help="Is it the same again? Exits with 1 if a verdict failed.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(verify)


@verify.command()
@probing_options
@_guarded
def determinism(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What the picture shows.")
    ] = LOOKED_AT,
    batch: Annotated[
        int, typer.Option(metavar="N", help="See too what a batch does to the bits.")
    ] = 0,
    process: Annotated[
        bool, typer.Option("--process/--no-process", help="Repeat in another process, too.")
    ] = True,
    cost: Annotated[
        bool, typer.Option("--cost", help="Measure, too, what deterministic kernels cost.")
    ] = False,
    require: RequireFlag = "identical",
    device: DeviceFlag = "auto",
    json_report: JsonFlag = False,
    quiet: QuietFlag = False,
    **given: Any,
) -> None:
    """Run the same request again, in every way that should change nothing, and compare bits."""
    from danqing.cli.verify import FAILED, run_determinism, trace_job

    job = trace_job(prompt, device, given)
    if not run_determinism(
        job,
        batch=batch,
        process=process,
        cost=cost,
        require=require,
        as_json=json_report,
        quiet=quiet,
    ):
        raise typer.Exit(FAILED)


@verify.command()
@probing_options
@_guarded
def parity(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the picture shows.")
    ] = None,
    candidate: Annotated[
        str, typer.Option(metavar="DEVICE", help="What is judged.  [default: auto]")
    ] = "auto",
    reference: Annotated[
        str,
        typer.Option(
            metavar="DEVICE", help="What it is compared with; or a trace's file.  [default: cpu]"
        ),
    ] = "cpu",
    require: Annotated[
        str,
        typer.Option(
            metavar="RUNG",
            help="identical (the same bits), close (every joint within what its precision costs), "
            "alike (the pictures are), or any: exit with 1 if it is not.  [default: close]",
        ),
    ] = "close",
    lpips: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Weights of LPIPS, as safetensors: measure that distance, too."
        ),
    ] = None,
    json_report: JsonFlag = False,
    quiet: QuietFlag = False,
    **given: Any,
) -> None:
    """Compare a device with another, joint by joint, and name the first layer that is wrong."""
    from danqing.cli.verify import FAILED, run_parity, trace_job

    job = trace_job(prompt or LOOKED_AT, candidate, given)
    if not run_parity(
        job,
        reference,
        prompted=prompt is not None,
        lpips=lpips,
        require=require,
        as_json=json_report,
        quiet=quiet,
    ):
        raise typer.Exit(FAILED)


@verify.command()
@probing_options
@_guarded
def invariance(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What the picture shows.")
    ] = LOOKED_AT,
    batch: Annotated[int, typer.Option(metavar="N", help="Size of the batch.", min=2)] = 2,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Judge compiling, too; it takes a minute.")
    ] = False,
    require: Annotated[
        str,
        typer.Option(
            metavar="RUNG",
            help="identical, close or any: exit with 1 if a switch is not; a batch is told, not "
            "judged.  [default: close]",
        ),
    ] = "close",
    device: DeviceFlag = "auto",
    json_report: JsonFlag = False,
    quiet: QuietFlag = False,
    **given: Any,
) -> None:
    """Judge every switch of memory and speed: is the picture the same with it?"""
    from danqing.cli.verify import FAILED, run_invariance, trace_job

    job = trace_job(prompt, device, given)
    if not run_invariance(
        job, batch=batch, compiled=compiled, require=require, as_json=json_report, quiet=quiet
    ):
        raise typer.Exit(FAILED)


@verify.command()
@request_options
@_guarded
def traces(
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="A trace.")],
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="Another.")],
    require: RequireFlag = "any",
    json_report: JsonFlag = False,
) -> None:
    """Compare two traces joint by joint; no weights are needed."""
    from danqing.cli.verify import FAILED, run_traces

    if not run_traces(candidate, reference, require=require, as_json=json_report):
        raise typer.Exit(FAILED)


@app.command()
@probing_options
@_guarded
def report(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the picture shows.")
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where the report goes.  [default: report]")
    ] = "report",
    reference: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="What it is compared with: a device, a trace's file, or none.  [default: cpu]",
        ),
    ] = "cpu",
    edit: Annotated[
        str | None,
        typer.Option("--edit", metavar="TEXT", help="A second case: do this with the picture."),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures timed.")] = 3,
    batch: Annotated[
        int, typer.Option(metavar="N", min=0, help="Size of the batch that is tried; 0: none.")
    ] = 2,
    cost: Annotated[
        bool, typer.Option("--cost/--no-cost", help="Measure what deterministic kernels cost.")
    ] = True,
    process: Annotated[
        bool, typer.Option("--process/--no-process", help="Repeat in another process, too.")
    ] = True,
    switches: Annotated[
        bool,
        typer.Option("--switches/--no-switches", help="Judge each switch of memory and speed."),
    ] = True,
    require: Annotated[
        str,
        typer.Option(
            metavar="RUNG",
            help="identical, close, alike or any, as in verify parity.  [default: close]",
        ),
    ] = "close",
    lpips: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Weights of LPIPS, as safetensors: measure that distance, too."
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Run nothing: say what changed between two report.json."),
    ] = None,
    views: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Run nothing: write the pages of a report.json again."),
    ] = None,
    device: DeviceFlag = "auto",
    json_report: JsonFlag = False,
    quiet: QuietFlag = False,
    **given: Any,
) -> None:
    """Measure everything, and write the report: JSON, Markdown and one HTML page."""
    from danqing.cli import reporting as reports
    from danqing.cli.options import setting_names
    from danqing.cli.verify import FAILED, trace_job
    from danqing.errors import NoEffectError
    from danqing.files import expand

    if compare is not None or views is not None:
        settings = [name for name, value in given.items() if name in setting_names() and value]
        typed = {"PROMPT": prompt, "--edit": edit, "--lpips": lpips}
        unused = [*(name for name, value in typed.items() if value is not None), *settings]
        if unused or (compare is not None and views is not None):
            raise NoEffectError(
                "--compare and --views run nothing, and stand alone",
                seen=", ".join(unused) or "both",
            )
    if json_report and compare is None:
        raise NoEffectError("--json has no effect without --compare: report.json is written anyway")
    if compare is not None:
        passed = reports.run_comparison(*compare, as_json=json_report)
    elif views is not None:
        passed = reports.run_views(views)
    else:
        asked = reports.ReportJob(
            job=trace_job(prompt or LOOKED_AT, device, given),
            prompted=prompt is not None,
            out=expand(out),
            reference=reference,
            edit=edit,
            repeats=repeats,
            batch=batch,
            cost=cost,
            process=process,
            switches=switches,
            require=require,
            lpips=None if lpips is None else expand(lpips),
            quiet=quiet,
        )
        passed = reports.run(asked)
    if not passed:
        raise typer.Exit(FAILED)


@app.command()
@request_options
@_guarded
def show(
    picture: Annotated[str, typer.Argument(metavar="PICTURE", help="A picture danqing made.")],
    json_record: JsonFlag = False,
) -> None:
    """Print the record a picture carries: what was asked, and what made it."""
    from danqing.cli.show import run

    run(picture, as_json=json_record)


@app.command()
@request_options
@_guarded
def models(
    everything: Annotated[
        bool, typer.Option("--all", help="List what danqing does not run, too.")
    ] = False,
    json_report: JsonFlag = False,
) -> None:
    """List the models on this disk: built in, in the hubs' caches, in DANQING_MODELS."""
    from danqing.cli.check import run_models

    run_models(everything=everything, as_json=json_report)


@app.command()
@request_options
@_guarded
def check(
    place: Annotated[
        str, typer.Argument(metavar="PLACE", help="A folder, a file, or a model's id on a hub.")
    ],
    component: ComponentFlag = None,
    allow_pt: AllowPtFlag = False,
    check_values: Annotated[
        bool,
        typer.Option("--check-values", help="Read every tensor and look for NaN and infinity."),
    ] = False,
    digest: Annotated[
        bool, typer.Option("--digest", help="Print the SHA-256 of each file; computed once.")
    ] = False,
    json_report: JsonFlag = False,
) -> None:
    """Check weights before they are used: files, headers, every tensor's name and shape."""
    from danqing.cli.check import run
    from danqing.cli.generate import read_components

    run(
        place,
        read_components(component or []),
        values=check_values,
        digest=digest,
        allow_pt=allow_pt,
        as_json=json_report,
    )


@app.command()
@request_options
@_guarded
def pull(
    repository: Annotated[
        str, typer.Argument(metavar="ID", help="The model's id on the hub: owner/name.")
    ],
    source: Annotated[
        str, typer.Option("--from", metavar="HUB", help="huggingface or modelscope.")
    ] = "huggingface",
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit.")
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="diffusers, bfl, or auto: diffusers' where the model has it."
        ),
    ] = "auto",
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Take these files instead; may be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files; download nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Download a model's weights, once; the only command that uses the network."""
    from danqing.cli.pull import run

    run(
        repository,
        source=source,
        revision=revision,
        layout=layout,
        include=include or [],
        dry_run=dry_run,
        quiet=quiet,
    )


@app.command()
@request_options
@_guarded
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a file, or a model's id on a hub.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A folder that does not exist yet.")
    ],
    layout: Annotated[
        str, typer.Option(metavar="NAME", help="diffusers; of FLUX.1 also bfl or comfy.")
    ] = "diffusers",
    dtype: Annotated[
        str,
        typer.Option(metavar="NAME", help="keep, bfloat16, float16, float32 or int8."),
    ] = "keep",
    component: ComponentFlag = None,
    allow_pt: AllowPtFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Write weights in another layout or dtype, one tensor at a time."""
    from danqing.cli.convert import run
    from danqing.cli.generate import read_components

    run(
        source,
        target,
        read_components(component or []),
        layout=layout,
        dtype=dtype,
        allow_pt=allow_pt,
        quiet=quiet,
    )


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@request_options
@_guarded
def rehearse(
    program: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- PROGRAM",
            help="A command of danqing (generate ...), or python and a script.",
        ),
    ] = None,
    chip: Annotated[
        str, typer.Option(metavar="NAME", help="910B3, 910A, 310P3, ...  [default: 910B3]")
    ] = "910B3",
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="What a card can allocate.  [default: the chip's]"),
    ] = None,
    cards: Annotated[int, typer.Option(metavar="N", min=1, max=16, help="How many.")] = 1,
    json_report: JsonFlag = False,
) -> None:
    """Run a program on a simulated NPU: what would this chip refuse, and in which line?"""
    from danqing.cli import rehearsing as rehearsal

    code = rehearsal.run(
        program or [], chip=chip, memory=memory, devices=cards, as_json=json_report
    )
    raise typer.Exit(code)


@app.command()
@request_options
@_guarded
def doctor(
    paint: Annotated[
        bool,
        typer.Option(
            "--paint",
            help="Paint ten pictures with the pocket model and compare them with the "
            "references in the package: does this device paint the right picture?",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --paint: the device.  [default: auto]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --paint: what it computes in.  [default: auto]"),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="With --paint: keep the pictures there."),
    ] = None,
    json_report: JsonFlag = False,
) -> None:
    """Report what this machine has, what is missing, and how to get it."""
    if paint:
        from danqing.cli.paint import run as run_suite

        run_suite(device=device, dtype=dtype, keep=keep, as_json=json_report)
        return
    for name, value in (("--device", device), ("--dtype", dtype), ("--keep", keep)):
        if value is not None:
            from danqing.errors import NoEffectError

            raise NoEffectError(f"{name} has no effect without --paint", seen=value)
    from danqing.cli.doctor import run

    run(as_json=json_report)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    print("danqing: terminated", file=sys.stderr)
    raise SystemExit(EXIT_TERMINATED)


def _encode_anyway(error: UnicodeError) -> tuple[bytes, int]:
    """Print the bytes of a file name that is not UTF-8; escape what the terminal cannot show."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is not text
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return character.encode("ascii", "backslashreplace"), error.start + 1


def main() -> None:
    """Run the command line."""
    terminal.keep_descriptors()
    signal.signal(signal.SIGTERM, _terminate)
    codecs.register_error("danqing", _encode_anyway)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="danqing")
    app()
