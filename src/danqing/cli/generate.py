"""`danqing generate`: from flags to pictures."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from danqing.cli.offline import offline_proof
from danqing.cli.progress import make_listener
from danqing.cli.records import (
    find_model,
    left_out,
    read_recorded,
    require_names,
    shown_options,
    typed_options,
)
from danqing.cli.terminal import print_json
from danqing.errors import (
    CheckpointError,
    DanqingError,
    NoEffectError,
    RequestError,
)
from danqing.escaping import escape
from danqing.files import expand
from danqing.models import identify, open_checkpoint
from danqing.options import Options
from danqing.pictures import check_target, fill_template
from danqing.request import Request, request_from_record
from danqing.weights import POCKET, Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from danqing.cli.records import Recorded
    from danqing.engine import Engine
    from danqing.generation import Picture
    from danqing.models.base import ModelSpec
    from danqing.runner import Listener

DEFAULT_OUTPUT = "{model}-{seed}.png"
_SIZE = re.compile(r"(\d{1,6})\s*[xX×*]\s*(\d{1,6})")  # noqa: RUF001 - people paste the real sign


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the command line asked for; None where a flag was not given."""

    prompts: list[str]
    prompts_file: str | None
    model_path: str | None
    components: list[str]
    allow_pt: bool
    from_picture: str | None
    trust: bool
    output_image: str | None
    overwrite: bool
    rules: str | None
    size: str | None
    device: str | None
    dtype: str | None
    placement: str | None
    memory: str | None
    tile: str | None
    quantise: str | None
    prompt_cache: str | None
    attention: str | None
    deterministic: bool
    compile_with: str | None
    fused: str | None
    place: list[str] | None
    batch: int
    loop: bool
    dry_run: bool
    json_lines: bool
    quiet: bool
    proof: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One request and where its pictures go.

    Attributes:
        request: what to paint.
        output: template of the file names.
        batch: pictures computed together.
        only: the one picture to keep; the others are there to make its batch what it was.
        expected_sha256: digest of the pixels, where they are known.
    """

    request: Request
    output: str
    batch: int
    only: int | None = None
    expected_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How to open the engine."""

    model_path: str
    device: str
    dtype: str
    components: Mapping[str, str]
    placement: str = "auto"
    memory: int | None = None
    tile: str = "auto"
    quantise: str = "off"
    prompt_cache: Path | None = None
    planned_for: Request | None = None
    batch: int = 1
    attention: str = "auto"
    deterministic: bool = False
    compile_with: str = "off"
    fused: str = "auto"
    place: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    notes: tuple[str, ...] = ()
    recorded: Recorded | None = None


def run(job: Job) -> None:
    """Do the job; errors are raised, pictures finished before stay."""
    with offline_proof() if job.proof else contextlib.nullcontext():
        _run(job)


def _run(job: Job) -> None:
    if job.trust and not job.from_picture:
        raise NoEffectError("--trust has no effect without --from")
    settings = {**job.settings, **read_size(job.size, job.settings)}
    opening, targets = _from_picture(job, settings) if job.from_picture else _plain(job, settings)
    # what can be wrong without torch is found before it is imported
    checkpoint = open_weights(opening.model_path, opening.components, allow_pt=job.allow_pt)
    spec = identify(checkpoint)
    for target in targets:
        check_target_of(spec, target)
    _check_effect(job, targets)
    opening = planned_for(opening, spec, targets)
    if job.prompt_cache is not None:
        opening = replace(opening, prompt_cache=expand(job.prompt_cache))
    with open_engine(checkpoint, opening) as engine:
        say = Printer(quiet=job.quiet, as_json=job.json_lines)
        say.plan(engine)
        for note in (*opening.notes, *_untaken(opening, engine)):
            say.note(note)
        if job.dry_run:
            _print_dry_run(engine, targets, as_json=job.json_lines)
            return
        if opening.fingerprint not in (None, engine.checkpoint.fingerprint):
            raise CheckpointError(
                "these are not the weights that made the picture",
                seen=f"{engine.checkpoint.path}: fingerprint {engine.checkpoint.fingerprint[:16]}",
                allowed=f"fingerprint {(opening.fingerprint or '')[:16]}",
                hint="name the right ones with --model-path",
            )
        with make_listener(quiet=job.quiet) as listen:
            engine.load(listen)
            painter = Painter(engine, job, say, listen)
            painter.paint_all(targets)
            if job.loop:
                from danqing.cli.loop import converse

                converse(painter, settings)


def _untaken(opening: Opening, engine: Engine) -> Iterator[str]:
    """Yield what the record says and is not followed, as a note."""
    if opening.recorded is not None and (others := left_out(opening.recorded, engine.plan)):
        yield (
            f"not taken from the record: {', '.join(others)}; the bits may differ (--trust takes "
            "them)"
        )


def open_weights(place: str, components: Mapping[str, str], *, allow_pt: bool) -> Checkpoint:
    """Open a checkpoint; a `.pt` is read with torch, which danqing imports in its own way."""
    if allow_pt:
        from danqing import devices

        devices.import_torch()
    return open_checkpoint(place, components, allow_pt=allow_pt)


def planned_for(opening: Opening, spec: ModelSpec, targets: Sequence[Target]) -> Opening:
    """Plan for the largest of the pictures, so that memory is enough for all of them."""
    if not targets:
        return opening

    def pixels(target: Target) -> int:
        request = spec.resolve(target.request)
        return min(target.batch, request.num_images_per_prompt) * request.height * request.width

    largest = max(targets, key=pixels)
    together = min(largest.batch, largest.request.num_images_per_prompt)
    return replace(opening, planned_for=largest.request, batch=together)


def read_memory(text: str | None) -> int | None:
    """Return the bytes that `--memory` names.

    Raises:
        RequestError: it names none.
    """
    if text is None:
        return None
    return Options(memory=text).memory


def open_engine(checkpoint: Checkpoint, opening: Opening) -> Engine:
    """Open the engine; imports torch, transformers and diffusers.

    Those make a million objects that live as long as the process. Looking through them again and
    again for garbage, while they are imported and once more at exit, took 1.7 of 4.0 seconds
    (`from transformers import CLIPTextModel`, 2 cores, 2026-11-21); so they are left out of it.
    """
    gc.disable()
    try:
        from danqing.engine import Engine

        options = Options(
            device=opening.device,
            dtype=opening.dtype,
            placement=opening.placement,
            memory=opening.memory,
            tile=opening.tile,
            quantize=opening.quantise,
            prompt_cache=opening.prompt_cache,
            attention=opening.attention,
            deterministic=opening.deterministic,
            compile=opening.compile_with,
            fused=opening.fused,
            place=opening.place,
        )
        return Engine.open(
            checkpoint, options, planned_for=opening.planned_for, batch=opening.batch
        )
    finally:
        gc.freeze()
        gc.enable()


# --- what to paint -------------------------------------------------------------------------------


def _plain(job: Job, settings: Mapping[str, Any]) -> tuple[Opening, list[Target]]:
    targets = list(_targets(job, settings))
    if not targets and not job.loop:
        raise RequestError(
            "there is no prompt",
            allowed="a prompt, --prompts-file, --from or --loop",
            hint='danqing generate "three blue mountains under a red sun, a boat on the water"',
        )
    return (
        Opening(
            model_path=job.model_path or POCKET,
            device=job.device or "auto",
            dtype=job.dtype or "auto",
            components=read_components(job.components),
            placement=job.placement or "auto",
            memory=read_memory(job.memory),
            tile=job.tile or "auto",
            quantise=job.quantise or "off",
            attention=job.attention or "auto",
            deterministic=job.deterministic,
            compile_with=job.compile_with or "off",
            fused=job.fused or "auto",
            place=read_components(job.place or [], "--place", "NAME=DEVICE"),
        ),
        targets,
    )


def _targets(job: Job, settings: Mapping[str, Any]) -> Iterator[Target]:
    output = job.output_image or DEFAULT_OUTPUT
    for prompt in job.prompts:
        request = Request(prompt=_with_rules(prompt, job.rules), **settings)
        yield Target(request=request, output=output, batch=job.batch)
    if job.prompts_file is not None:
        for number, line in read_prompts(job.prompts_file):
            row = {**settings, **line}
            place = row.pop("output_image", output)
            rules = row.pop("rules", job.rules)
            if isinstance(row.get("prompt"), str):
                row["prompt"] = _with_rules(row["prompt"], rules)
            try:
                yield Target(request=Request(**row), output=str(place), batch=job.batch)
            except RequestError as error:
                error.what = f"{job.prompts_file}, line {number}: {error.what}"
                raise


def _with_rules(prompt: str, rules: str | None) -> str:
    return f"{rules} {prompt}" if rules else prompt


def read_prompts(place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and settings of each line that is not blank.

    A line that begins with `{` is a JSON object with at least a prompt; any other is a prompt.
    """
    try:
        text = sys.stdin.read() if place == "-" else expand(place).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("the prompts file cannot be read", seen=f"{place}: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("{"):
            try:
                yield number, json.loads(stripped)
            except (ValueError, RecursionError) as error:
                raise RequestError(
                    f"{place}, line {number} begins like a JSON object but is none",
                    seen=f"{stripped[:80]} ({error})",
                ) from error
        elif stripped:
            yield number, {"prompt": stripped}


def read_size(size: str | None, settings: Mapping[str, Any]) -> dict[str, int]:
    """Return height and width of a size as it is typed: `768x512`, the width first."""
    if size is None:
        return {}
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise RequestError(
            "the size cannot be read", seen=size, allowed="WIDTHxHEIGHT, such as 768x512"
        )
    found = {"width": int(match[1]), "height": int(match[2])}
    for name, value in found.items():
        if settings.get(name, value) != value:
            raise RequestError(
                f"--size and --{name} contradict each other",
                seen=f"{size} and {settings[name]}",
            )
    return found


def read_components(
    texts: Sequence[str], flag: str = "--component", form: str = "NAME=PLACE"
) -> dict[str, str]:
    """Return places by component's name, from texts such as `vae=FILE` or `vlm=npu:1`."""
    table = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not (name and equals and place):
            raise RequestError(
                f"{flag} is given as {form}",
                seen=text,
                allowed="vlm=npu:1, ..." if flag == "--place" else "t5=DIR, vae=FILE, ...",
            )
        table[name.strip()] = place
    return table


def _from_picture(job: Job, settings: Mapping[str, Any]) -> tuple[Opening, list[Target]]:
    if job.prompts or job.prompts_file or job.loop or job.rules:
        raise RequestError("--from takes its prompt from the picture", hint="leave out the others")
    recorded = read_recorded(job.from_picture or "")
    opening = _recorded_opening(job, recorded, images="image" in settings)
    # an image to edit is read only if it is not replaced
    image = {"image": settings["image"]} if "image" in settings else {}
    request = request_from_record(recorded.record, image)
    others = {name: value for name, value in settings.items() if name != "image"}
    changed = any(getattr(request, name) != value for name, value in others.items())
    digests = [digest for _, digest in recorded.images]
    changed = changed or [one.pixels_sha256 for one in request.image or ()] != digests
    output = job.output_image or DEFAULT_OUTPUT
    if changed:
        changed_request = request.replace(**others)
        return opening, [Target(request=changed_request, output=output, batch=job.batch)]
    notes = [*opening.notes]
    _note_threads(recorded.threads, notes)
    # the last bits may depend on the batch, so it is made as it was
    batch = request.select(-recorded.position, recorded.batch)
    return replace(opening, notes=tuple(notes)), [
        Target(
            request=batch,
            output=output,
            batch=recorded.batch,
            only=recorded.position,
            expected_sha256=recorded.pixels_sha256,
        )
    ]


def _recorded_opening(job: Job, recorded: Recorded, *, images: bool) -> Opening:
    """Return how to open the engine: what is typed, then what may be taken from the record."""
    components = read_components(job.components)
    options = dict.fromkeys(recorded.options, "")
    notes: list[str] = []
    if job.trust:
        files = recorded.named(
            model=job.model_path is None, images=not images, components=components
        )
        files += shown_options(recorded)
        Printer(quiet=job.quiet, as_json=False).note(f"taken from the record: {', '.join(files)}")
        place: str | None = recorded.place
        components = {**recorded.components, **components}
        options = typed_options(recorded)
        options["device"] = job.device or _device_or_auto(options["device"], notes)
    else:
        place = job.model_path or find_model(recorded, components)
        if job.model_path and (others := recorded.named_components(components)):
            notes.append(f"not opened, for the record alone names them: {', '.join(others)}")
        require_names(recorded, model=place is not None, images=images)
    return Opening(
        model_path=job.model_path or place or POCKET,
        device=job.device or options["device"] or "auto",
        dtype=job.dtype or options["dtype"] or "auto",
        components=components,
        placement=job.placement or "auto",
        memory=read_memory(job.memory),
        tile=job.tile or options["tile"] or "auto",
        quantise=job.quantise or options["quantise"] or "off",
        attention=job.attention or options["attention"] or "auto",
        deterministic=job.deterministic or options["deterministic"] == "yes",
        compile_with=job.compile_with or options["compile"] or "off",
        fused=job.fused or options["fused"] or "auto",
        place=read_components(job.place or [], "--place", "NAME=DEVICE"),
        fingerprint=recorded.fingerprint,
        notes=tuple(notes),
        recorded=None if job.trust else recorded,
    )


def _note_threads(made_with: int | None, notes: list[str]) -> None:
    if made_with is None:
        return
    from danqing import devices

    here = devices.select("cpu").device.threads
    if made_with != here:
        notes.append(
            f"the picture was made with {made_with} threads, here are {here}: the bits may differ"
        )


def _device_or_auto(name: str, notes: list[str]) -> str:
    from danqing import devices
    from danqing.errors import DeviceError

    try:
        devices.select(name)
    except DeviceError:
        notes.append(f"the picture was made on {name}, which is not here: the bits may differ")
        return "auto"
    return name


# --- doing it ------------------------------------------------------------------------------------


def check_target_of(spec: ModelSpec, target: Target) -> None:
    """Fail before the work if the request or the output name cannot be."""
    request = spec.resolve(target.request)
    path = fill_template(target.output, seed=0, index=0, model=spec.name)
    check_target(path, pixels=request.width * request.height)


def _check_effect(job: Job, targets: list[Target]) -> None:
    """Refuse options that would change nothing."""
    if job.loop and job.dry_run:
        raise NoEffectError("--loop has no effect in a dry run", hint="leave out one of the two")
    if job.batch > 1 and any(target.expected_sha256 for target in targets):
        raise NoEffectError(
            "--batch has no effect: the picture is made again in a batch as large as its own",
            seen=job.batch,
        )
    single = all(target.request.num_images_per_prompt == 1 for target in targets)
    if job.batch > 1 and single and not job.loop:
        raise NoEffectError(
            "--batch has no effect: every prompt makes one picture",
            seen=job.batch,
            hint="a batch is made of pictures of one prompt: --num-images",
        )


@dataclass(frozen=True)
class Painter:
    """Makes the pictures of targets, saves each as soon as it is finished, and says so."""

    engine: Engine
    job: Job
    say: Printer
    listen: Listener | None

    def paint_all(self, targets: list[Target]) -> None:
        """Paint one target after the other; if it ends early, say how many pictures there are."""
        total = sum(
            1 if target.only is not None else target.request.num_images_per_prompt
            for target in targets
        )
        saved = 0
        try:
            for target in targets:
                for _ in self.paint(target):
                    saved += 1
        except (DanqingError, KeyboardInterrupt):
            if total > 1:
                print(f"danqing: {saved} of {total} pictures were saved", file=sys.stderr)
            raise

    def paint(self, target: Target) -> Iterator[Path]:
        """Yield the file of each picture when it is written."""
        pictures = self.engine.paint(target.request, batch=target.batch, listen=self.listen)
        for picture in pictures:
            if target.only not in (None, picture.index):
                continue
            path = fill_template(
                target.output,
                seed=picture.request.seed,
                index=picture.index,
                model=self.engine.spec.name,
            )
            path = picture.save(path, overwrite=self.job.overwrite)
            yield path  # it is saved, even if that cannot be printed
            self.say.picture(picture, path, target)


def _print_dry_run(engine: Engine, targets: list[Target], *, as_json: bool) -> None:
    for target in targets:
        resolved = engine.spec.resolve(target.request)
        request, notes = resolved.forecast, resolved.notes
        row = {
            "dry_run": True,
            "request": request.model_dump(),
            "output": target.output,
            "notes": list(notes),
            "plan": engine.plan.as_dict(),
        }
        if as_json:
            print_json(row)
            continue
        print(f"would paint {describe(request)}")
        print(f"  {request.prompt!r} -> {target.output}")
        for note in notes:
            print(f"  note: {note}")


def describe(request: Request) -> str:
    """Return a request's settings in one line."""
    parts = [
        f"{request.width}x{request.height}",
        f"{request.num_inference_steps} steps",
        f"seed {'random' if request.seed is None else request.seed}",
    ]
    if request.guidance_scale is not None:
        parts.append(f"guidance {request.guidance_scale:g}")
    if request.image is not None:
        parts.append("from " + " and ".join(image.name for image in request.image))
    if request.num_images_per_prompt > 1:
        parts.append(f"{request.num_images_per_prompt} pictures")
    return ", ".join(parts)


class Printer:
    """What the command says: pictures on standard output, plan and notes on standard error."""

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        """Choose how much is said, and in what form."""
        self.quiet = quiet
        self.as_json = as_json
        self._batches_said: set[int] = set()

    def plan(self, engine: Engine) -> None:
        """Say what will happen."""
        if self.quiet:
            return
        for label, text in engine.plan.lines():
            print(f"{label:<18} {text}", file=sys.stderr)

    def note(self, text: str) -> None:
        """Say what the user should know."""
        print(f"danqing: note: {escape(text, one_line=True)}", file=sys.stderr)

    def picture(self, picture: Picture, path: Path, target: Target) -> None:
        """Say that a picture is written, and what was notable about it."""
        for note in picture.notes if picture.index == (target.only or 0) else ():
            self.note(note)
        self._batch(picture.provenance.batch)
        same = None
        if target.expected_sha256 is not None:
            same = picture.pixels_sha256 == target.expected_sha256
            self.note(
                "the same picture, bit for bit" if same else "the pixels differ from the original"
            )
        if self.as_json:
            extra = {} if same is None else {"identical": same}
            print_json({"file": str(path), **extra, **picture.record()})
        elif self.quiet or not (sys.stdout.isatty() and sys.stderr.isatty()):
            print(path)  # at a terminal the line below says it too
        sys.stdout.flush()
        if not self.quiet:
            print(f"{path}: {describe(picture.request)}; {_costs(picture)}", file=sys.stderr)

    def _batch(self, batch: Mapping[str, Any]) -> None:
        """Say once for each size what computing together did to the bits."""
        if "bits" not in batch or batch["size"] in self._batches_said:
            return
        self._batches_said.add(batch["size"])
        difference = batch["max_pixel_difference"]
        how = "the same bits" if not difference else f"a largest pixel difference of {difference}"
        self.note(
            f"batch {batch['size']} is {batch['bits']}: its last picture made alone as well "
            f"has {how}"
        )


def _costs(picture: Picture) -> str:
    seconds: dict[str, float] = {}
    steps, compiling = 0, 0.0
    for cost in picture.stages:
        seconds[cost.name] = seconds.get(cost.name, 0.0) + cost.seconds
        steps += cost.steps
        compiling += cost.compile_seconds
    parts = [f"{name} {spent:.2f} s" for name, spent in seconds.items()]
    each = ""
    if steps:
        each = f"{(seconds.get('denoise', 0.0) - compiling) / steps:.3f} s/step"
        each = f" ({each}, and {compiling:.1f} s compiling)" if compiling else f" ({each})"
    return ", ".join(part + each * part.startswith("denoise") for part in parts)
