"""Fills a benchmark's folder, picture by picture; goes on where it was when it is run again."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.atomic import sweep, write_whole
from danqing.errors import NoEffectError, OutputError, RequestError
from danqing.evalsets.rows import ADDED, picture_of, read_rows
from danqing.pictures import save
from danqing.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from PIL.Image import Image

    from danqing.evalsets.protocols import Protocol
    from danqing.generation import Picture
    from danqing.runner import Listener, Runner

STATE = "danqing-eval-set.json"
_GRID_SIDE = 2


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark to generate the images of.

    Attributes:
        protocol: of the benchmark.
        prompts: the user's copy of its prompts.
        out: the folder that its scorer reads.
        pictures: folder of the images to edit; beside the prompts if left out.
        name: of each file, instead of the protocol's.
        rules: text before every prompt; a row's own `rules` come first.
        limit: number of rows; all if left out.
        batch: images of a prompt computed together.
        settings: of the requests, instead of the protocol's.
    """

    protocol: Protocol
    prompts: Path
    out: Path
    pictures: Path | None = None
    name: str | None = None
    rules: str | None = None
    limit: int | None = None
    batch: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """Folder of the images to edit."""
        return self.pictures or (self.prompts if self.prompts.is_dir() else self.prompts.parent)

    @property
    def state(self) -> Path:
        """File that says how the folder was begun; beside it, as scorers list what is inside."""
        folder = self.out.absolute() if self.out.name not in ("", "..") else self.out.resolve()
        return folder.with_name(f"{folder.name}.{STATE}")


def paint_set(
    runner: Runner,
    task: Task,
    *,
    listen: Listener | None = None,
    on_row: Callable[[int, int, bool], None] = lambda *_: None,
) -> int:
    """Generate a benchmark's images.

    Image `index` of row `number` has the seed `seed + number * images + index`, whatever was
    generated before, so that a run that was interrupted gives what one run would have.

    Args:
        runner: of an opened model.
        task: the benchmark.
        listen: is called with progress.
        on_row: is called with the number of the row, of all rows, and whether its images existed.

    Returns:
        Number of images generated now.

    Raises:
        RequestError: the prompts cannot be used.
        OutputError: the folder holds images made otherwise, or cannot be written.
    """
    protocol = task.protocol
    if protocol.edits and "image" not in runner.spec.takes:
        raise NoEffectError(
            f"{protocol.title} edits images, and {runner.spec.title} does not",
            seen=runner.spec.name,
        )
    rows = read_rows(task.prompts, within=protocol.rows)[: task.limit]
    common = _settings(runner, protocol, task.settings)
    _check_state(runner, task, {**common, "name": task.name, "rules": task.rules})
    targets = _targets(task, rows, 1 if protocol.grid else common["num_images_per_prompt"])
    painted = 0
    for number, row in enumerate(rows):
        files = targets[number]
        there = all(file.exists() for file in files)
        if there:  # nothing is written here, which would remove what a killed run left
            for folder in {file.parent for file in files}:
                sweep(folder)
        else:
            request = _request(task, row, number, common)
            _write_beside(task, request, row, number)
            painted += _paint(runner, task, request, files, listen)
        on_row(number + 1, len(rows), there)
    return painted


def _targets(task: Task, rows: Sequence[Mapping[str, Any]], count: int) -> list[tuple[Path, ...]]:
    """Return the files of each row's images.

    Raises:
        RequestError: two rows that ask for different images have one file name: the second would
            count as painted already.
    """
    template = task.name or task.protocol.file
    found: list[tuple[Path, ...]] = []
    known: dict[Path, int] = {}
    for number, row in enumerate(rows):
        files = tuple(_place(task, template, row, number, index) for index in range(count))
        other = known.setdefault(files[0], number)
        if other != number and _asks(task.protocol, rows[other]) != _asks(task.protocol, row):
            raise RequestError(
                "two rows share a file name",
                seen=f"rows {other} and {number}: {files[0].relative_to(task.out)}",
                allowed="one prompt for each file name",
                hint="--prompts with one file of them, or --name with a field that differs",
            )
        found.append(files)
    return found


def _asks(protocol: Protocol, row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells one row's images from another's."""
    image = _first(row, protocol.image)
    return _first(row, protocol.prompt), row.get("rules"), repr(image) if image else None


def _settings(runner: Runner, protocol: Protocol, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the protocol's settings as far as the model takes them, and those asked for."""
    own = {k: v for k, v in protocol.common.items() if k in runner.spec.takes}
    found = {**own, "num_images_per_prompt": protocol.images, **asked}
    if found["num_images_per_prompt"] != protocol.images and protocol.grid:
        raise RequestError(
            f"{protocol.title} puts {protocol.images} pictures into one",
            seen=found["num_images_per_prompt"],
            allowed=str(protocol.images),
        )
    return found


def _check_state(runner: Runner, task: Task, settings: Mapping[str, Any]) -> None:
    """Keep images of different models or settings apart.

    Earlier versions kept the state inside the folder, where scorers take it for an image: it is
    moved.

    Raises:
        OutputError: the folder was begun otherwise.
    """
    now = {
        "eval_set": task.protocol.title,
        "fingerprint": runner.fingerprint,
        "dtype": runner.plan.dtype,
        "settings": {key: str(value) for key, value in sorted(settings.items())},
    }
    place, inside = task.state, task.out / STATE
    try:
        task.out.mkdir(parents=True, exist_ok=True)
        if inside.is_file():
            inside.replace(place)
        if not place.exists():
            _write(place, (json.dumps(now, indent=1) + "\n").encode())
            return
        before = json.loads(place.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError("the folder cannot be used", seen=f"{place}: {error}") from error
    if before != now:
        other = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        raise OutputError(
            "the folder holds images that were made otherwise",
            seen=f"{task.out}: another {', '.join(other)}",
            hint="take another --out, or the model and settings it was begun with",
        )


def _request(task: Task, row: Mapping[str, Any], number: int, common: Mapping[str, Any]) -> Request:
    protocol = task.protocol
    prompt = _first(row, protocol.prompt)
    if not isinstance(prompt, str):
        raise RequestError(
            f"row {number} has no prompt", seen=", ".join(row), allowed=", ".join(protocol.prompt)
        )
    before = row.get("rules") or task.rules
    settings = dict(common)
    settings["seed"] += number * settings["num_images_per_prompt"]
    if protocol.edits:
        settings["image"] = picture_of(_first(row, protocol.image), task.root)
    return Request(prompt=f"{before} {prompt}" if before else prompt, **settings)


def _paint(
    runner: Runner,
    task: Task,
    request: Request,
    files: Sequence[Path],
    listen: Listener | None,
) -> int:
    """Generate a row's images, and write the missing ones."""
    pictures: list[Picture] = []
    for picture in runner.paint(request, batch=task.batch, listen=listen):
        pictures.append(picture)
        if not task.protocol.grid and not files[picture.index].exists():
            picture.save(files[picture.index])
    if task.protocol.grid:
        record = {**pictures[0].record(), "grid": [one.request.seed for one in pictures]}
        save(_grid([picture.image for picture in pictures]), record, files[0])
    return len(pictures)


def _write_beside(task: Task, request: Request, row: Mapping[str, Any], number: int) -> None:
    """Write the row, and the image to edit, where the scorer wants them."""
    protocol = task.protocol
    if protocol.row is not None:
        kept = {k: v for k, v in row.items() if k not in ADDED}
        text = json.dumps(kept, ensure_ascii=False) + "\n"
        _write(_place(task, protocol.row, row, number, 0), text.encode())
    if protocol.source is not None and request.image:
        buffer = io.BytesIO()
        request.image[0].image.save(buffer, "PNG")
        _write(_place(task, protocol.source, row, number, 0), buffer.getvalue())


def _grid(images: list[Image]) -> Image:
    """Put four pictures into one: the first two above the others."""
    from PIL import Image as Images

    width, height = images[0].size
    whole = Images.new("RGB", (_GRID_SIDE * width, _GRID_SIDE * height))
    for place, image in enumerate(images):
        whole.paste(image, (place % _GRID_SIDE * width, place // _GRID_SIDE * height))
    return whole


def _place(task: Task, name: str, row: Mapping[str, Any], number: int, index: int) -> Path:
    """Return the file that a template names for a row.

    Raises:
        RequestError: the row lacks a field of it, or the name leads out of the folder.
    """
    key = _first(row, (*task.protocol.key, "key"))
    key = number if key is None else key
    group = "-".join(str(key).split("-")[:2])
    fields = {**row, "key": key, "group": group, "number": number, "index": index}
    try:
        relative = Path(name.format(**fields))
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise RequestError(
            f"row {number} cannot be given a file name",
            seen=f"{name}: {type(error).__name__}: {error}",
            allowed=", ".join(sorted(map(str, fields))),
            hint="--name says how files are named",
        ) from error
    if relative.is_absolute() or ".." in relative.parts:
        raise RequestError(
            f"row {number} would be written outside the folder",
            seen=relative,
            allowed=str(task.out),
        )
    return task.out / relative


def _first(row: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _write(place: Path, data: bytes) -> None:
    """Write a small file, whole or not at all."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(place) as file:
            file.write(data)
    except OSError as error:
        raise OutputError("a file cannot be written", seen=f"{place}: {error.strerror}") from error
