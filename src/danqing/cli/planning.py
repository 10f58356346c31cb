"""`danqing plan`: what a run would do, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danqing.cli.opening import open_engine, open_weights
from danqing.cli.prompts import read_size
from danqing.cli.terminal import print_json
from danqing.models import identify
from danqing.plan import plan_lines
from danqing.quantities import size as in_units

if TYPE_CHECKING:
    from danqing.cli.jobs.plan import Planning
    from danqing.plan import Plan


def run(job: Planning) -> None:
    """Print the plan as a table or as JSON."""
    checkpoint = open_weights(job.model_path, job.options)
    settings = {**job.settings, **read_size(job.size, job.settings)}
    resolved = identify(checkpoint).resolve(job.replace(settings=settings).request())
    request, notes = resolved.forecast, resolved.notes
    with open_engine(checkpoint, job.options, planned_for=request, batch=job.batch) as engine:
        if job.as_json:
            row = {"plan": engine.plan.as_dict(), "request": request.model_dump(), "notes": notes}
            print_json(row, indent=1)
            return
        for label, text in plan_lines(engine.plan):
            print(f"{label:<18} {text}")
        _print_stages(engine.plan)
        for note in notes:
            print(f"note: {note}")


def _print_stages(plan: Plan) -> None:
    print()
    print(f"{'stage':<18} {'beside weights':>16} {'at the most':>14} {'time':>9}")
    for stage, peak in plan.peak_bytes.items():
        seconds = f"{plan.seconds[stage]:.1f} s" if stage in plan.seconds else "-"
        beside = in_units(plan.activation_bytes[stage])
        print(f"{stage:<18} {beside:>16} {in_units(peak):>14} {seconds:>9}")
