"""Flags of `danqing check`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Json, Weights
from danqing.cli.options import Job


class Checking(Job):
    """Weights, and how thoroughly to check them."""

    place: Annotated[
        str, typer.Argument(metavar="PATH", help="A folder, a file, or a model's ID on a hub.")
    ]
    options: Weights
    values: Annotated[
        bool,
        typer.Option("--check-values", help="Read every tensor and look for NaN and infinity."),
    ] = False
    digest: Annotated[
        bool, typer.Option("--digest", help="Print the SHA-256 of each file; computed once.")
    ] = False
    as_json: Json = False
