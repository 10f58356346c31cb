"""The commands: each calls what does its job, and nothing heavy is imported before."""

from __future__ import annotations

import typer

from danqing.cli.app import exit_unless
from danqing.cli.jobs.check import Checking
from danqing.cli.jobs.convert import Converting
from danqing.cli.jobs.doctor import Examination
from danqing.cli.jobs.edit import Editing
from danqing.cli.jobs.eval_set import EvalSet
from danqing.cli.jobs.generate import Painting
from danqing.cli.jobs.models import Listing
from danqing.cli.jobs.plan import Planning
from danqing.cli.jobs.pull import Pulling
from danqing.cli.jobs.rehearse import Rehearsal
from danqing.cli.jobs.report import Reporting
from danqing.cli.jobs.serve import Serving
from danqing.cli.jobs.show import Showing
from danqing.cli.jobs.trace import Tracing
from danqing.cli.jobs.verify import Comparing, Repeating, Switching, Traces
from danqing.cli.options import takes


@takes(Painting)
def generate(job: Painting) -> None:
    """Generate images from prompts, with weights on this disk."""
    from danqing.cli.generate import run

    run(job)


@takes(Editing)
def edit(job: Editing) -> None:
    """Edit an image, with a model that can; the same as generate with --image."""
    from danqing.cli.generate import run

    images = [job.picture, *job.settings.get("image", [])]
    run(job.replace(settings={**job.settings, "image": images}))


@takes(EvalSet)
def eval_set(job: EvalSet) -> None:
    """Generate a benchmark's images, in the folders its own scorer reads."""
    from danqing.cli.evalset import list_protocols, run

    if job.known:
        list_protocols(as_json=job.as_json)
    else:
        run(job)


@takes(Planning)
def plan(job: Planning) -> None:
    """Print what a run would do, and why: placement, memory, time. Reads no weights."""
    from danqing.cli.planning import run

    run(job)


@takes(Tracing)
def trace(job: Tracing) -> None:
    """Run once and record the tensors at its joints, for comparison with another run."""
    from danqing.cli.verify import run_trace

    run_trace(job)


@takes(Repeating)
def determinism(job: Repeating) -> None:
    """Run the same request again, in every way that should change nothing, and compare bits."""
    from danqing.cli.verify import run_determinism

    exit_unless(run_determinism(job))


@takes(Comparing)
def parity(job: Comparing) -> None:
    """Compare a device with another, joint by joint, and name the first layer that is wrong."""
    from danqing.cli.verify import run_parity

    exit_unless(run_parity(job))


@takes(Switching)
def invariance(job: Switching) -> None:
    """Judge every switch of memory and speed: does the image stay the same?"""
    from danqing.cli.verify import run_invariance

    exit_unless(run_invariance(job))


@takes(Traces)
def traces(job: Traces) -> None:
    """Compare two traces joint by joint; no weights are needed."""
    from danqing.cli.verify import run_traces

    exit_unless(run_traces(job))


@takes(Reporting)
def report(job: Reporting) -> None:
    """Measure everything, and write the report: JSON, Markdown and one HTML page."""
    from danqing.cli import reporting

    reporting.check_effect(job)
    if job.compare is not None:
        passed = reporting.run_comparison(*job.compare, as_json=job.as_json)
    elif job.views is not None:
        passed = reporting.run_views(job.views)
    else:
        passed = reporting.run(job)
    exit_unless(passed)


@takes(Serving)
def serve(job: Serving) -> None:
    """Serve images: the images API that clients already speak, and a page."""
    from danqing.cli.serving import run

    run(job)


@takes(Showing)
def show(job: Showing) -> None:
    """Print an image's record: the request, and what made it."""
    from danqing.cli.show import run

    run(job.picture, as_json=job.as_json)


@takes(Listing)
def models(job: Listing) -> None:
    """List the models on this disk: built in, in the hubs' caches, in DANQING_MODELS."""
    from danqing.cli.check import run_models

    run_models(everything=job.everything, as_json=job.as_json)


@takes(Checking)
def check(job: Checking) -> None:
    """Check weights before they are used: files, headers, every tensor's name and shape."""
    from danqing.cli.check import run

    run(job)


@takes(Pulling)
def pull(job: Pulling) -> None:
    """Download a model's weights, once; the only command that uses the network."""
    from danqing.cli.pull import run

    run(job)


@takes(Converting)
def convert(job: Converting) -> None:
    """Write weights in another layout or dtype, one tensor at a time."""
    from danqing.cli.convert import run

    run(job)


@takes(Rehearsal)
def rehearse(job: Rehearsal) -> None:
    """Run a program on a simulated NPU: what would this chip refuse, and in which line?"""
    from danqing.cli.rehearsing import run

    raise typer.Exit(run(job))


@takes(Examination)
def doctor(job: Examination) -> None:
    """Report what this machine has, what is missing, and how to get it."""
    if job.paint:
        from danqing.cli.paint import run as run_suite

        run_suite(job)
        return
    from danqing.cli.doctor import run

    run(job)


COMMANDS = (
    generate, edit, eval_set, plan, trace, serve, report, show, models, check, pull, convert,
    rehearse, doctor,
)  # fmt: skip
"""In the order of the help."""
CHECKS = (determinism, parity, invariance, traces)
"""Under `danqing verify`."""
