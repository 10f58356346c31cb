"""Flags of `danqing edit`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.generate import Painting


class Editing(Painting):
    """The same, with an image to edit."""

    picture: Annotated[
        str, typer.Argument(metavar="IMAGE", help="Image to edit; --image adds further ones.")
    ]
