"""Flags of `danqing generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from danqing.cli.jobs.flags import MODEL_PATH, Quiet, Rules, Size
from danqing.cli.options import AllOptions, Job, Settings

DEFAULT_OUTPUT = "{model}-{seed}.png"


class Painting(Job):
    """Prompts, or an image to reproduce, and where the images go."""

    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Content of the images.")
    ] = None
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Another prompt. May be repeated."),
    ] = None
    rules: Rules = None
    prompts_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A prompt per line, or a JSON object with a prompt and its own settings; - reads "
            "standard input.",
        ),
    ] = None
    model_path: Annotated[str | None, MODEL_PATH] = None
    from_picture: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="IMAGE",
            help="Reproduce an image from its record: the request, and the model found by name. "
            "Other settings change it.",
        ),
    ] = None
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="With --from: also open the files that the record names (model, components, "
            "images to edit), and take its options.",
        ),
    ] = False
    output_image: Annotated[
        str | None,
        typer.Option(
            "--output-image",
            "--output",
            "-o",
            metavar="NAME",
            help="Output file: .png, .jpg or .webp; {seed}, {index} and {model} are filled in.  "
            "[default: {model}-{seed}.png]",
        ),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace existing files; else take the next free name."),
    ] = False
    size: Size = None
    options: AllOptions
    settings: Settings
    batch: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Images of a prompt computed together; whether that changes their bits is "
            "measured and reported.",
        ),
    ] = 1
    loop: Annotated[
        bool, typer.Option("--loop", help="Read prompts from the terminal; the model stays loaded.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the requests; read no weights.")
    ] = False
    proof: Annotated[
        bool,
        typer.Option("--offline-proof", help="Fail if anything opens a network connection."),
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON record per image on standard output.")
    ] = False
    quiet: Quiet = False

    @property
    def texts(self) -> list[str]:
        """All prompts of the command line."""
        return [*(self.prompts or ()), *(self.prompt or ())]

    @property
    def output(self) -> str:
        """Template of the output files' names."""
        return self.output_image or DEFAULT_OUTPUT
