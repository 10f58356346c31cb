"""Paints targets, saves each image as soon as it is finished, and prints what happened."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from danqing.cli.terminal import print_json
from danqing.errors import DanqingError
from danqing.escaping import escape
from danqing.pictures import check_target, fill_template

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from danqing.engine import Engine
    from danqing.generation import Picture
    from danqing.request import Request
    from danqing.runner import Listener, Runner, Spec


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


def check_target_of(spec: Spec, target: Target) -> None:
    """Fail before the work if the request or the output name cannot be."""
    request = spec.resolve(target.request)
    path = fill_template(target.output, seed=0, index=0, model=spec.name)
    check_target(path, pixels=request.width * request.height)


@dataclass(frozen=True)
class Painter:
    """Makes the pictures of targets, saves each as soon as it is finished, and says so."""

    runner: Runner
    overwrite: bool
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
        pictures = self.runner.paint(target.request, batch=target.batch, listen=self.listen)
        for picture in pictures:
            if target.only not in (None, picture.index):
                continue
            path = fill_template(
                target.output,
                seed=picture.request.seed,
                index=picture.index,
                model=self.runner.spec.name,
            )
            path = picture.save(path, overwrite=self.overwrite)
            yield path  # it is saved, even if that cannot be printed
            self.say.picture(picture, path, target)


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
        from danqing.plan import plan_lines

        for label, text in plan_lines(engine.plan):
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
