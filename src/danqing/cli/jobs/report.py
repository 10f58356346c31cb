"""Flags of `danqing report`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Json, Lpips, Probing, Process, Quiet


class Reporting(Probing):
    """The run to measure, and what to measure of it."""

    out: Annotated[str, typer.Option(metavar="FOLDER", help="Output folder.")] = "report"
    reference: Annotated[
        str, typer.Option(metavar="DEVICE", help="Device to compare with, a trace's file, or none.")
    ] = "cpu"
    edit: Annotated[
        str | None,
        typer.Option("--edit", metavar="TEXT", help="Second case: edit the image so."),
    ] = None
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Images timed.")] = 3
    batch: Annotated[
        int, typer.Option(metavar="N", min=0, help="Size of the batch to compare; 0: none.")
    ] = 2
    cost: Annotated[
        bool,
        typer.Option("--cost/--no-cost", help="Measure the cost of deterministic kernels."),
    ] = True
    process: Process = True
    switches: Annotated[
        bool,
        typer.Option("--switches/--no-switches", help="Judge each switch of memory and speed."),
    ] = True
    require: Annotated[
        str, typer.Option(metavar="RUNG", help="identical, close, alike or any, as verify parity.")
    ] = "close"
    lpips: Lpips = None
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B", help="Run nothing: print what changed between two report.json."
        ),
    ] = None
    views: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Run nothing: write the pages of a report.json again."),
    ] = None
    as_json: Json = False
    quiet: Quiet = False
