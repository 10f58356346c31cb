"""Flags of `danqing rehearse`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Json
from danqing.cli.options import Job


class Rehearsal(Job):
    """A program, and the simulated chip it runs on."""

    program: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- PROGRAM",
            help="A command of danqing (generate ...), or python and a script.",
        ),
    ] = None
    chip: Annotated[str, typer.Option(metavar="NAME", help="910B3, 910A, 310P3, ...")] = "910B3"
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Memory of a card.  [default: the chip's]"),
    ] = None
    cards: Annotated[int, typer.Option(metavar="N", min=1, max=16, help="Number of cards.")] = 1
    as_json: Json = False
