"""`danqing plan`: what a run would do, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from danqing.cli.generate import open_engine, open_weights, read_size
from danqing.cli.terminal import print_json
from danqing.models import identify
from danqing.quantities import size as in_units
from danqing.request import Request

if TYPE_CHECKING:
    from danqing.cli.verify import TraceJob
    from danqing.plan import Plan


def run(job: TraceJob, *, size: str | None, batch: int, as_json: bool) -> None:
    """Print the plan as a table or as JSON."""
    checkpoint = open_weights(job.model_path, job.opening.components, allow_pt=False)
    settings = {**job.settings, **read_size(size, job.settings)}
    resolved = identify(checkpoint).resolve(Request(prompt=job.prompt, **settings))
    request, notes = resolved.forecast, resolved.notes
    opening = replace(job.opening, planned_for=request, batch=batch)
    with open_engine(checkpoint, opening) as engine:
        if as_json:
            row = {"plan": engine.plan.as_dict(), "request": request.model_dump(), "notes": notes}
            print_json(row, indent=1)
            return
        for label, text in engine.plan.lines():
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
