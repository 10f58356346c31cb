"""Flags of `danqing serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import Quiet
from danqing.cli.options import Fields, Job
from danqing.options import Options


class Serving(Job):
    """Models, where they run, and who may use them."""

    model_path: Annotated[
        list[str] | None,
        typer.Option(
            "--model-path",
            "-m",
            metavar="PATH",
            help="Weights. May be repeated: all are served.  [default: pocket]",
        ),
    ] = None
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="Device: auto, cpu, cuda[:i], npu[:i], xpu[:i] or mps. May be repeated: a worker "
            "each.  [default: auto]",
        ),
    ] = None
    options: Annotated[Options, Fields(Options, without=("device",))]
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Beyond loopback, keys are required.")
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes any free one.")
    ] = 8000
    api_key_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Accepted API keys: `name key` or a key on each line."),
    ] = None
    no_auth: Annotated[
        bool,
        typer.Option(
            "--no-auth",
            help="Disable authentication: anyone who can reach the address may use the server.",
        ),
    ] = False
    journal: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="SQLite file that keeps jobs, so they survive a crash."),
    ] = None
    queue: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum of queued jobs.")] = 64
    per_client: Annotated[
        int, typer.Option(metavar="N", min=1, help="Maximum of queued and running jobs of one key.")
    ] = 16
    max_side: Annotated[
        int,
        typer.Option(metavar="N", min=64, max=16384, help="Maximum side in pixels; planned for."),
    ] = 1024
    max_steps: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="Maximum steps of an image.")
    ] = 100
    deadline: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=1, help="Seconds from acceptance to the last image."),
    ] = 600.0
    grace: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="Seconds a running job may take to finish on shutdown."
        ),
    ] = 30.0
    safety_checker: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Image classifier that decides what is withheld."),
    ] = None
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Serve a page for people at /.")
    ] = True
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts into the log, too.")
    ] = False
    quiet: Quiet = False
