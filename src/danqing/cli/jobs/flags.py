"""Flags that several commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.options import Fields, Job, Settings
from danqing.options import Options
from danqing.request import Request

DEFAULT_PROMPT = "three blue mountains under a red sun, a boat on the water"

MODEL_PATH = typer.Option(
    "--model-path",
    "-m",
    metavar="PATH",
    help="Weights: a folder, a file, or a model's ID on a hub, looked up on this disk.",
)
ModelPath = Annotated[str, MODEL_PATH]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no plan and no progress.")]
Prompt = Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="Content of the image.")]
Size = Annotated[
    str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Width and height at once: 768x512.")
]
Rules = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Text before every prompt without its own rules.")
]
Require = Annotated[
    str, typer.Option(metavar="RUNG", help="identical: exit with 1 if a bit differs; or any.")
]
Process = Annotated[
    bool, typer.Option("--process/--no-process", help="Repeat in another process, too.")
]
Lpips = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="LPIPS weights, as safetensors: measure that distance, too."),
]
Weights = Annotated[Options, Fields(Options, without=tuple(
    name for name in Options.model_fields if name not in ("components", "allow_pt")
))]  # fmt: skip
"""Options of a command that reads weights and runs no model."""
Uncached = Annotated[Options, Fields(Options, without=("prompt_cache",))]
"""Options of a command that computes prompt embeddings each time."""


class Probing(Job):
    """A model, and the request whose run is looked into."""

    prompt: Prompt = None
    model_path: ModelPath = "pocket"
    options: Uncached
    settings: Settings

    def request(self) -> Request:
        """Return the request, with a prompt of our own if none was typed."""
        return Request(prompt=self.prompt or DEFAULT_PROMPT, **self.settings)
