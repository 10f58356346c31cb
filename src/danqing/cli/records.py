"""What `--from` takes from an image's record, which anybody may have written.

By itself it takes the request, apart from images to edit, and the model by name and fingerprint.
Only `--trust` lets a record choose the files that are opened, the device and the other options.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.devices import OWN_ATTENTION
from danqing.errors import DanqingError, OutputError, RequestError, UntrustedRecordError
from danqing.models import open_checkpoint
from danqing.options import LOCAL, Options
from danqing.pictures import read_record
from danqing.plan import ATTENTION
from danqing.request import MAX_BATCH
from danqing.weights import BUILT_IN, places

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from danqing.plan import Plan

MODELS_FOLDER = "models"
"""Folder of the working directory that is searched too: the docs put models there."""
_LONGEST = 4096
_SHOWN = 100
_REQUIRED: Any = object()


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A record whose fields have the types they must have.

    Attributes:
        record: the whole record.
        images: path and digest of each image that was edited; the path is empty if it had none.
        place: where the model was: a path, or a built-in name.
        layout: of the model.
        fingerprint: of the model's weights.
        components: places of single components.
        options: how the model ran, without the files that were opened.
        threads: number of threads that computed, if it matters.
        batch: images computed together.
        position: of this image among them.
        pixels_sha256: digest of the pixels.
    """

    record: Mapping[str, Any]
    images: tuple[tuple[str, str], ...]
    place: str
    layout: str
    fingerprint: str
    components: Mapping[str, str]
    options: Options
    threads: int | None
    batch: int
    position: int
    pixels_sha256: str

    def named(
        self, *, model: bool, images: bool, components: Mapping[str, str] | None = None
    ) -> list[str]:
        """Return the files that the record names, as they are shown.

        Args:
            model: name the model, and its components.
            images: name the images to edit.
            components: components that are left out.
        """
        files = []
        if model:
            files.append(f"model {shown(self.place)}")
            files += self.named_components(components or {})
        if images:
            files += [f"image {shown(path or '(from memory)')}" for path, _ in self.images]
        return files

    def named_components(self, components: Mapping[str, str]) -> list[str]:
        """Return the components that the record names, but those given here, as they are shown."""
        return [
            f"component {shown(f'{name}={place}')}"
            for name, place in self.components.items()
            if name not in components
        ]


def read_recorded(path: str) -> Recorded:
    """Read an image's record and check the type of each field that is used.

    Raises:
        OutputError: the record is missing, or a field is missing or of another type.
    """
    record = read_record(path)
    read = _Reader(record, path)
    batch = read.number("provenance.batch.size", most=MAX_BATCH, least=1)
    return Recorded(
        record=record,
        images=tuple(read.images()),
        place=read.text("provenance.model.path"),
        layout=read.text("provenance.model.layout", ""),
        fingerprint=read.text("provenance.model.fingerprint"),
        components=read.texts("provenance.model.components"),
        options=read.options(),
        threads=read.number("provenance.device.threads", most=2**20, default=None),
        batch=batch,
        position=read.number("provenance.batch.position", most=batch - 1),
        pixels_sha256=read.text("picture.pixels_sha256"),
    )


def find_model(recorded: Recorded, components: Mapping[str, str]) -> str | None:
    """Return where the recorded model is on this disk, by name and fingerprint.

    The place that the record names is not looked at. Searched are the models that come with
    danqing, the folders of `danqing models`, and `models` in the working directory.

    Args:
        recorded: names the model and its fingerprint.
        components: places of single components, from the command line.
    """
    if recorded.place in BUILT_IN:
        return str(BUILT_IN[recorded.place])
    name = Path(recorded.place).name
    here = places.models_in(Path(MODELS_FOLDER).absolute())
    found = {found.path: None for found in (*places.all_places(), *here)}
    for path in sorted(found, key=lambda path: path.name != name):
        try:
            checkpoint = open_checkpoint(path, components)
            if recorded.layout not in ("", checkpoint.layout):
                continue
            if checkpoint.fingerprint == recorded.fingerprint:
                return str(path)
        except (DanqingError, OSError):
            continue
    return None


def require_names(recorded: Recorded, *, model: bool, images: bool) -> None:
    """Refuse to open what only the record names.

    Args:
        recorded: the record.
        model: the model is named on the command line, or was found.
        images: the images to edit are named on the command line.

    Raises:
        UntrustedRecordError: something is not.
    """
    needed = recorded.named(model=not model, images=not images)
    if not needed:
        return
    flags = [] if model else ["-m PATH"]
    flags += ["--component NAME=PATH"] if recorded.components and not model else []
    flags += [] if images or not recorded.images else ["--image FILE"]
    lost = "" if model else "; no model here has its name and fingerprint"
    raise UntrustedRecordError(
        "the record names files that are not opened without consent",
        seen=", ".join(needed) + lost,
        allowed="prompt, seed, size, steps, guidance, and a model found by name (danqing models)",
        hint=f"name the files: {' '.join(flags)}; or --trust opens what the record names",
    )


def left_out(recorded: Recorded, plan: Plan) -> list[str]:
    """Return the recorded options that a run does not follow and that can change its bits."""
    followed = {
        "device": plan.device,
        "dtype": plan.dtype,
        "attention": plan.attention,
        "deterministic": plan.deterministic,
        "compile": plan.compiled,
        "fused": ",".join(plan.fused) or "off",
        "tile": str(plan.tile or "off"),
        "quantize": "int8" if any(part.arithmetic for part in plan.components) else "off",
        "place": {part.name: part.device for part in plan.components if part.device},
    }
    return [
        _option(name, value)
        for name, value in recorded.options
        if name in followed and value not in ("auto", followed[name])
    ]


def shown_options(recorded: Recorded) -> list[str]:
    """Return the recorded options, as they are shown."""
    return [_option(name, value) for name, value in recorded.options.typed.items()]


def restored(recorded: Recorded) -> Options:
    """Return the recorded options, to get the same again.

    On a CPU the kernels of our own are left to choose: another CPU has others, or none.
    """
    options = recorded.options
    if options.device != "cpu":
        return options
    return options.replace(
        attention="auto" if options.attention in OWN_ATTENTION else options.attention,
        fused="auto" if options.fused != "off" else "off",
    )


def _option(name: str, value: Any) -> str:
    if isinstance(value, dict):
        value = ",".join(f"{key}={one}" for key, one in value.items()) or "none"
    value = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
    return shown(f"{name}={value}")


def shown(text: str) -> str:
    """Return a text of a record, cut to a length that can be printed."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class _Reader:
    """Reads fields of a record by dotted names."""

    def __init__(self, record: Mapping[str, Any], path: str) -> None:
        self._record = record
        self._path = path

    def text(self, name: str, default: str = _REQUIRED) -> str:
        value: str = self._value(name, str, default)
        if "\0" in value or len(value) > _LONGEST:
            raise self._damaged(name, "a path that cannot be")
        try:
            os.fsencode(value)
        except UnicodeError:
            raise self._damaged(name, "a text that cannot be encoded") from None
        if value.startswith("~") and not value.startswith("~/"):
            raise self._damaged(name, "somebody's home folder")
        return value

    def texts(self, name: str) -> dict[str, str]:
        table = self._value(name, dict)
        return {str(key): _Reader(table, self._path).text(key) for key in table}

    def number(
        self, name: str, *, most: int, least: int = 0, default: int | None = _REQUIRED
    ) -> Any:
        value = self._value(name, int, default)
        if value is not None and (isinstance(value, bool) or not least <= value <= most):
            raise self._damaged(name, f"a number beyond {least} to {most}")
        return value

    def images(self) -> Iterator[tuple[str, str]]:
        images = self._value("request.image", list, None)
        for number, image in enumerate(images or ()):
            if not isinstance(image, dict):
                raise self._damaged(f"request.image.{number}", type(image).__name__)
            read = _Reader(image, self._path)
            path = "" if image.get("path") is None else read.text("path")
            yield path, read.text("pixels_sha256")

    def options(self) -> Options:
        """Return the recorded options; older records have them among what made the image."""
        table = self._value("options", dict, None)
        try:
            return Options(**self._older() if table is None else self._bounded(table))
        except RequestError as error:
            raise self._damaged("options", shown(f"{error.what}: {error.seen}")) from error

    def _bounded(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """Return a table without the options that no record decides; texts are bounded."""
        kept = {name: value for name, value in table.items() if name not in LOCAL}
        read = _Reader(kept, self._path)
        return {
            name: read.text(name)
            if isinstance(value, str)
            else read.texts(name)
            if isinstance(value, dict)
            else value
            for name, value in kept.items()
        }

    def _older(self) -> dict[str, Any]:
        device = "provenance.device"
        tile = self.number(f"{device}.tile", most=2**20, default=None)
        fused = self._value(f"{device}.fused", list, [])
        if not all(isinstance(one, str) and len(one) <= _SHOWN for one in fused):
            raise self._damaged(f"{device}.fused", "no list of names")
        recorded = self.text("provenance.attention", "auto")
        return {
            "device": self.text(f"{device}.name"),
            "dtype": self.text("provenance.dtype"),
            # the oldest have a sentence there: torch always chose
            "attention": recorded if recorded in ATTENTION else "auto",
            "deterministic": self._value(f"{device}.deterministic", bool, False),
            "compile": self.text(f"{device}.compiled", "off"),
            "fused": ",".join(fused) or "off",
            "tile": str(tile or "off"),
            "quantize": "int8" if self._value(f"{device}.quantised", dict, {}) else "off",
        }

    def _value(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        value: Any = self._record
        for key in name.split("."):
            if not isinstance(value, dict):
                raise self._damaged(name, type(value).__name__)
            value = value.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if not isinstance(value, kind):
            raise self._damaged(name, "nothing" if value is None else type(value).__name__)
        return value

    def _damaged(self, name: str, seen: str) -> OutputError:
        return OutputError(
            "the picture's record is damaged", seen=f"{self._path}: {shown(name)} is {seen}"
        )
