"""What `generate` and `edit`, the commands that paint, have in common: flags, and the work."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danqing.cli.options import extended, setting_names, setting_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ComponentFlag = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PLACE",
        help="Take one component (t5, clip, vlm, vae, transformer, ...) from elsewhere; may be "
        "repeated.",
    ),
]


PlaceFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--place",
        metavar="NAME=DEVICE",
        help="Put one component on another device: vlm=npu:1; may be repeated.",
    ),
]

AllowPtFlag = Annotated[
    bool,
    typer.Option(
        "--allow-pt",
        help="The file named is DeepGen's original .pt: open it, of tensors only "
        "(torch.load with weights_only).",
    ),
]


def _flags(
    *,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="The same; may be repeated."),
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Put before every prompt, as some benchmarks want it."),
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A prompt on each line, or a JSON object with a prompt and its own settings; "
            "- reads standard input.",
        ),
    ] = None,
    model_path: Annotated[
        str | None,
        typer.Option(
            "--model-path",
            "-m",
            metavar="PLACE",
            help="Folder or file of the weights, or a model's id on a hub, looked up on this "
            "disk.  [default: pocket, which comes with danqing]",
        ),
    ] = None,
    component: ComponentFlag = None,
    allow_pt: AllowPtFlag = False,
    from_picture: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="PICTURE",
            help="Make an image again from the record it carries; other settings change it. Taken "
            "from the record: the request, and the model by its name.",
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="With --from: open the files that the record names (model, components, images to "
            "edit), and take its device, dtype and other options.",
        ),
    ] = False,
    output_image: Annotated[
        str | None,
        typer.Option(
            "--output-image",
            "--output",
            "-o",
            metavar="NAME",
            help="Where the picture goes: .png, .jpg or .webp; {seed}, {index} and {model} are "
            "filled in.  [default: {model}-{seed}.png]",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files; else the next free name.")
    ] = False,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Both at once: 768x512.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="auto, cpu, cuda[:i], npu[:i], xpu[:i] or mps.  [default: auto]"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="auto, bfloat16, float16 or float32.  [default: auto]"),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="auto, resident (all weights stay on the device), staged (each stage's are read "
            "when it begins and leave when it ends) or streamed (so, and the blocks of the large "
            "ones are read while they are computed).  [default: auto]",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What the run may take: of the device, or on a CPU of the process: 8GiB, "
            "12000MB.  [default: nine tenths of what is free]",
        ),
    ] = None,
    quantise: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="off, or int8: the transformer's blocks compute with bytes. Faster and half as "
            "large, and not exact; verify parity says how far off.  [default: off]",
        ),
    ] = None,
    prompt_cache: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep there what prompts became: one that comes again needs no text encoder.",
        ),
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="auto (decode in tiles if the whole picture does not fit), off, or the side of "
            "the tiles in pixels.  [default: auto]",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="auto (on some CPUs in bfloat16 native, else torch), torch (the kernel it "
            "prefers), native (our own for such CPUs), math, flash, efficient or cudnn; on an NPU "
            "npu or mindie.  [default: auto]",
        ),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Only kernels that give the same bits again."),
    ] = False,
    place: PlaceFlag = None,
    fused: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="auto (on some CPUs in bfloat16 all, else off), off, all, or some of the device's "
            "fused kernels: rms_norm,rope,group_norm_silu of an NPU; rms_norm,rope,gelu,"
            "modulated_norm of such a CPU.  [default: auto]",
        ),
    ] = None,
    compile_with: Annotated[
        str | None,
        typer.Option(
            "--compile",
            metavar="NAME",
            help="off, or compile the transformer's blocks before the first step: inductor; on an "
            "NPU npugraph or torchair.  [default: off]",
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Pictures of a prompt computed together; it is measured and said whether they "
            "keep the bits they have alone.",
        ),
    ] = 1,
    loop: Annotated[
        bool, typer.Option("--loop", help="Read prompts from the terminal; the model stays loaded.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen; read no weights.")
    ] = False,
    proof: Annotated[
        bool,
        typer.Option("--offline-proof", help="Fail if anything here opens a network connection."),
    ] = False,
    json_lines: Annotated[
        bool, typer.Option("--json", help="One JSON record for each picture on standard output.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No plan and no progress.")] = False,
) -> None:
    """Declare the flags; nothing calls this."""


def _probing_flags(
    *,
    model_path: Annotated[
        str,
        typer.Option("--model-path", "-m", metavar="PLACE", help="The weights.  [default: pocket]"),
    ] = "pocket",
    component: ComponentFlag = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="As in generate.  [default: auto]")
    ] = "auto",
    placement: Annotated[
        str, typer.Option(metavar="NAME", help="As in generate.  [default: auto]")
    ] = "auto",
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="As in generate.")] = None,
    quantise: Annotated[
        str, typer.Option(metavar="NAME", help="As in generate.  [default: off]")
    ] = "off",
    tile: Annotated[
        str, typer.Option(metavar="N", help="As in generate.  [default: auto]")
    ] = "auto",
    attention: Annotated[
        str, typer.Option(metavar="NAME", help="As in generate.  [default: auto]")
    ] = "auto",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="As in generate.")] = False,
    compile_with: Annotated[
        str, typer.Option("--compile", metavar="NAME", help="As in generate.  [default: off]")
    ] = "off",
    fused: Annotated[
        str, typer.Option(metavar="NAMES", help="As in generate.  [default: auto]")
    ] = "auto",
    place: PlaceFlag = None,
) -> None:
    """Declare the flags of commands that look into a run; nothing calls this."""


def painting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command with `**given` all flags of a command that paints."""
    return extended(command, [*_declared(_flags), *setting_parameters()])


def probing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command with `**given` the flags of a command that looks into a run."""
    return extended(command, [*_declared(_probing_flags), *setting_parameters()])


def _declared(template: Callable[..., None]) -> list[inspect.Parameter]:
    hints = inspect.get_annotations(template, eval_str=True)
    return [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in inspect.signature(template).parameters.values()
    ]


def run_painting(
    prompts: Sequence[str] | None, images: Sequence[str], *, given: dict[str, Any]
) -> None:
    """Do what such a command was told.

    Args:
        prompts: without a flag before them.
        images: to be edited, without a flag before them.
        given: the flags.
    """
    from danqing.cli.generate import Job, run

    settings = {name: given.pop(name) for name in setting_names()}
    settings["image"] = [*images, *(settings["image"] or [])] or None
    run(
        Job(
            prompts=[*(prompts or []), *(given.pop("prompt") or [])],
            components=given.pop("component") or [],
            settings={name: value for name, value in settings.items() if value is not None},
            **given,
        )
    )
