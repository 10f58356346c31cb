"""Flags of `danqing pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.options import Job


class Pulling(Job):
    """A model on a hub, and the files to download."""

    repository: Annotated[str, typer.Argument(metavar="ID", help="ID on the hub: owner/name.")]
    source: Annotated[
        str, typer.Option("--from", metavar="HUB", help="huggingface or modelscope.")
    ] = "huggingface"
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit.")] = (
        None
    )
    layout: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="diffusers, bfl, or auto: diffusers' where the model has it."
        ),
    ] = "auto"
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Download these files instead. May be repeated."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files; download nothing.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False
