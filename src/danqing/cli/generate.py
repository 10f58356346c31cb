"""`danqing generate` and `edit`: from flags to images."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from danqing.cli.loop import converse
from danqing.cli.offline import offline_proof
from danqing.cli.opening import open_engine, open_weights
from danqing.cli.painting import Painter, Printer, Target, check_target_of, describe
from danqing.cli.progress import make_listener
from danqing.cli.prompts import read_prompts, read_size
from danqing.cli.records import (
    find_model,
    left_out,
    read_recorded,
    require_names,
    restored,
    shown,
    shown_options,
)
from danqing.cli.terminal import print_json
from danqing.errors import CheckpointError, DeviceError, NoEffectError, RequestError
from danqing.models import identify
from danqing.request import Request, request_from_record
from danqing.weights import POCKET

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from danqing.cli.jobs.generate import Painting
    from danqing.cli.records import Recorded
    from danqing.engine import Engine
    from danqing.models.base import ModelSpec
    from danqing.options import Options


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Which weights are opened, and how.

    Attributes:
        model_path: of the weights.
        options: how the model runs.
        recorded: the record that is followed, where there is one.
        notes: for the user.
    """

    model_path: str
    options: Options
    recorded: Recorded | None = None
    notes: Sequence[str] = ()


def run(job: Painting) -> None:
    """Do the job; errors are raised, images finished before stay."""
    with offline_proof() if job.proof else contextlib.nullcontext():
        _run(job)


def _run(job: Painting) -> None:
    if job.trust and not job.from_picture:
        raise NoEffectError("--trust has no effect without --from")
    settings = {**job.settings, **read_size(job.size, job.settings)}
    opening, targets = _from_picture(job, settings) if job.from_picture else _plain(job, settings)
    # what can be wrong without torch is found before it is imported
    checkpoint = open_weights(opening.model_path, opening.options)
    spec = identify(checkpoint)
    for target in targets:
        check_target_of(spec, target)
    _check_effect(job, targets)
    request, batch = _largest(spec, targets)
    with open_engine(checkpoint, opening.options, planned_for=request, batch=batch) as engine:
        say = Printer(quiet=job.quiet, as_json=job.as_json)
        say.plan(engine)
        for note in (*opening.notes, *_untaken(job, opening, engine)):
            say.note(note)
        if job.dry_run:
            _print_dry_run(engine, targets, as_json=job.as_json)
            return
        _check_fingerprint(opening.recorded, engine)
        with make_listener(quiet=job.quiet) as listen:
            engine.load(listen)
            painter = Painter(engine, job.overwrite, say, listen)
            painter.paint_all(targets)
            if job.loop:
                converse(painter, job, settings)


def _untaken(job: Painting, opening: Opening, engine: Engine) -> Iterator[str]:
    """Yield the recorded options that are not followed, as a note."""
    if opening.recorded is None or job.trust:
        return
    if others := left_out(opening.recorded, engine.plan):
        yield (
            f"not taken from the record: {', '.join(others)}; the bits may differ (--trust takes "
            "them)"
        )


def _check_fingerprint(recorded: Recorded | None, engine: Engine) -> None:
    if recorded is not None and recorded.fingerprint != engine.checkpoint.fingerprint:
        raise CheckpointError(
            "these are not the weights that made the image",
            seen=f"{engine.checkpoint.path}: fingerprint {engine.checkpoint.fingerprint[:16]}",
            allowed=f"fingerprint {recorded.fingerprint[:16]}",
            hint="name the right ones with --model-path",
        )


def _largest(spec: ModelSpec, targets: Sequence[Target]) -> tuple[Request | None, int]:
    """Return the largest request and its batch, so that memory is enough for all of them."""

    def pixels(target: Target) -> int:
        request = spec.resolve(target.request)
        return min(target.batch, request.num_images_per_prompt) * request.height * request.width

    if not targets:
        return None, 1
    largest = max(targets, key=pixels)
    return largest.request, min(largest.batch, largest.request.num_images_per_prompt)


# --- what to paint -------------------------------------------------------------------------------


def _plain(job: Painting, settings: Mapping[str, Any]) -> tuple[Opening, list[Target]]:
    targets = list(_targets(job, settings))
    if not targets and not job.loop:
        raise RequestError(
            "there is no prompt",
            allowed="a prompt, --prompts-file, --from or --loop",
            hint='danqing generate "three blue mountains under a red sun, a boat on the water"',
        )
    return Opening(model_path=job.model_path or POCKET, options=job.options), targets


def _targets(job: Painting, settings: Mapping[str, Any]) -> Iterator[Target]:
    for prompt in job.texts:
        request = Request(prompt=_with_rules(prompt, job.rules), **settings)
        yield Target(request=request, output=job.output, batch=job.batch)
    if job.prompts_file is not None:
        for number, line in read_prompts(job.prompts_file):
            row = {**settings, **line}
            place = row.pop("output_image", job.output)
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


def _from_picture(job: Painting, settings: Mapping[str, Any]) -> tuple[Opening, list[Target]]:
    if job.texts or job.prompts_file or job.loop or job.rules:
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
    if changed:
        changed_request = request.replace(**others)
        return opening, [Target(request=changed_request, output=job.output, batch=job.batch)]
    notes = [*opening.notes]
    _note_threads(recorded.threads, notes)
    # the last bits may depend on the batch, so it is made as it was
    batch = request.select(-recorded.position, recorded.batch)
    return replace(opening, notes=tuple(notes)), [
        Target(
            request=batch,
            output=job.output,
            batch=recorded.batch,
            only=recorded.position,
            expected_sha256=recorded.pixels_sha256,
        )
    ]


def _recorded_opening(job: Painting, recorded: Recorded, *, images: bool) -> Opening:
    """Return how to open the engine: what is typed, then what may be taken from the record."""
    typed, components = job.options.typed, job.options.components
    notes: list[str] = []
    if job.trust:
        files = recorded.named(
            model=job.model_path is None, images=not images, components=components
        )
        files += shown_options(recorded)
        Printer(quiet=job.quiet, as_json=False).note(f"taken from the record: {', '.join(files)}")
        options = restored(recorded)
        if "device" in typed:  # what it cannot do is refused as ever
            options = options.replace(device=job.options.device)
        options = _on_devices_here(options, notes).replace(**typed)
        options = options.replace(components={**recorded.components, **components})
        place: str | None = recorded.place
    else:
        options = job.options
        place = job.model_path or find_model(recorded, components)
        if job.model_path and (others := recorded.named_components(components)):
            notes.append(f"not opened, for the record alone names them: {', '.join(others)}")
        require_names(recorded, model=place is not None, images=images)
    return Opening(
        model_path=job.model_path or place or POCKET,
        options=options,
        recorded=recorded,
        notes=notes,
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


def _on_devices_here(options: Options, notes: list[str]) -> Options:
    """Return recorded options without the devices that are not here, and without their kernels."""
    lost = sorted({one for one in (options.device, *options.place.values()) if not _is_here(one)})
    if lost:
        names = shown(", ".join(lost))
        notes.append(f"the image was made on {names}, which is not here: the bits may differ")
    place = {name: where for name, where in options.place.items() if where not in lost}
    if options.device not in lost:
        return options.replace(place=place)
    return options.replace(place=place, device=None, attention=None, fused=None, compile=None)


def _is_here(device: str) -> bool:
    from danqing import devices

    try:
        devices.select(device)
    except DeviceError:
        return False
    return True


# --- checks and dry runs -------------------------------------------------------------------------


def _check_effect(job: Painting, targets: list[Target]) -> None:
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
