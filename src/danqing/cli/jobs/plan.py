"""Flags of `danqing plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Json, Probing, Size


class Planning(Probing):
    """The request to plan for."""

    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images computed together.")] = 1
    size: Size = None
    as_json: Json = False
