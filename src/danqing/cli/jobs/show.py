"""Flags of `danqing show`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Json
from danqing.cli.options import Job


class Showing(Job):
    """An image with a record."""

    picture: Annotated[str, typer.Argument(metavar="IMAGE", help="Image made by danqing.")]
    as_json: Json = False
