"""Flags of `danqing verify determinism`, `parity`, `invariance` and `traces`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Json, Lpips, Probing, Process, Quiet, Require
from danqing.cli.options import Fields, Job
from danqing.options import Options


class Repeating(Probing):
    """The run to repeat."""

    batch: Annotated[
        int, typer.Option(metavar="N", help="Also report what a batch does to the bits.")
    ] = 0
    process: Process = True
    cost: Annotated[
        bool, typer.Option("--cost", help="Also measure the cost of deterministic kernels.")
    ] = False
    require: Require = "identical"
    as_json: Json = False
    quiet: Quiet = False


class Comparing(Probing):
    """The run to judge, and its reference."""

    options: Annotated[
        Options,
        Fields(Options, without=("prompt_cache",), flags={"device": ("--candidate", "--device")}),
    ]
    reference: Annotated[
        str, typer.Option(metavar="DEVICE", help="Device to compare with, or a trace's file.")
    ] = "cpu"
    require: Annotated[
        str,
        typer.Option(
            metavar="RUNG",
            help="identical (the same bits), close (every joint within the cost of its precision), "
            "alike (the images are), or any: exit with 1 if it is not.",
        ),
    ] = "close"
    lpips: Lpips = None
    as_json: Json = False
    quiet: Quiet = False


class Switching(Probing):
    """The run whose switches are judged."""

    batch: Annotated[int, typer.Option(metavar="N", help="Size of the batch.", min=2)] = 2
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also judge compiling; it takes a minute.")
    ] = False
    require: Annotated[
        str,
        typer.Option(
            metavar="RUNG",
            help="identical, close or any: exit with 1 if a switch is not. A batch is reported, "
            "not judged.",
        ),
    ] = "close"
    as_json: Json = False
    quiet: Quiet = False


class Traces(Job):
    """Two traces."""

    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="A trace.")]
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="Another trace.")]
    require: Require = "any"
    as_json: Json = False
