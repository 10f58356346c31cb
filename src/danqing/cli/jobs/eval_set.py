"""Flags of `danqing eval-set`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Json, ModelPath, Quiet, Rules
from danqing.cli.options import AllOptions, Job, Settings


class EvalSet(Job):
    """A benchmark, its prompts, and the folder that its scorer reads."""

    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Benchmark; --list lists them.")
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Your copy of its prompts: a file, or a folder of files."
        ),
    ] = None
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Output folder, in the layout the scorer expects. An interrupted run resumes.",
        ),
    ] = None
    pictures: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Images to edit.  [default: beside the prompts]"),
    ] = None
    file_name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="TEMPLATE",
            help="Name of each file, if the benchmark's has changed: {key}, {number}, {index}, "
            "and any field of a row.",
        ),
    ] = None
    rules: Rules = None
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N prompts.")
    ] = None
    batch: Annotated[
        int, typer.Option(metavar="N", help="Images of a prompt computed together.")
    ] = 1
    model_path: ModelPath = "pocket"
    options: AllOptions
    settings: Settings
    known: Annotated[bool, typer.Option("--list", help="List the benchmarks.")] = False
    as_json: Json = False
    quiet: Quiet = False
