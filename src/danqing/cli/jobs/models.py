"""Flags of `danqing models`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Json
from danqing.cli.options import Job


class Listing(Job):
    """Which models to list."""

    everything: Annotated[
        bool, typer.Option("--all", help="Also list models that danqing does not run.")
    ] = False
    as_json: Json = False
