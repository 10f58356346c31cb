"""Flags of `danqing convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Weights
from danqing.cli.options import Job


class Converting(Job):
    """Weights, and the layout and dtype to write."""

    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a file, or a model's ID on a hub.")
    ]
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Output folder; it must not exist yet.")
    ]
    layout: Annotated[
        str, typer.Option(metavar="NAME", help="diffusers; of FLUX.1 also bfl or comfy.")
    ] = "diffusers"
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="keep, bfloat16, float16, float32 or int8.")
    ] = "keep"
    options: Weights
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False
