"""Flags of `danqing trace`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Probing, Quiet


class Tracing(Probing):
    """The run to record, and where."""

    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Content of the image.")]
    out: Annotated[str, typer.Option(metavar="FILE", help="Output file.")]
    digests: Annotated[
        bool, typer.Option("--digests", help="Record digests only: a small file.")
    ] = False
    depth: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="joint; or block or module: also sample the output of every block or module.",
        ),
    ] = "joint"
    quiet: Quiet = False
