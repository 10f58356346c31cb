"""Flags of `danqing doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Json
from danqing.cli.options import Fields, Job
from danqing.options import Options


class Examination(Job):
    """What to examine of this machine."""

    paint: Annotated[
        bool,
        typer.Option(
            "--paint",
            help="Generate ten images with the pocket model and compare them with the references "
            "in the package.",
        ),
    ] = False
    options: Annotated[Options, Fields(Options, without=("components", "allow_pt", "prompt_cache"))]
    keep: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="With --paint: keep the images here.")
    ] = None
    as_json: Json = False
