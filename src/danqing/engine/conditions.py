"""Conditioning of earlier prompts, in memory and on disk: a repeated prompt loads no encoder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from danqing.atomic import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from danqing.generation import Provenance
    from danqing.models.model import Model
    from danqing.request import Resolved

    Encoded = tuple[Any, tuple[str, ...]]

KEPT = 256
"""Prompts; beyond these, those that were not used for longest are removed."""
KEPT_IN_MEMORY = 4
"""Prompts whose conditioning stays in memory; it is small beside the weights."""
_SLACK_SECONDS = 60.0
_SUFFIX = ".conditioning.safetensors"


class Conditions:
    """The conditioning of the last prompts in memory, and of more in a folder if one is named."""

    def __init__(self, model: Model, folder: Path | None, origin: Callable[[], Provenance]) -> None:
        """Begin with nothing in memory.

        Args:
            model: says which settings a conditioning depends on.
            folder: of the cache on disk; None for none.
            origin: what makes the conditioning, beside the request; asked when it is needed.
        """
        self._model = model
        self._folder = folder
        self._origin = origin
        self._in_memory: dict[tuple[Any, ...], Encoded] = {}
        self._is_bypassed = False

    def find(self, request: Resolved) -> Encoded | None:
        """Return the conditioning of a prompt, if it is kept."""
        known = self._in_memory.get(self._key(request))
        if known is None and (on_disk := self._on_disk) is not None:
            known = on_disk.find(self._model.conditioning, self._settings(request))
        if known is not None:
            self._remember(request, known)
        return known

    def keep(self, request: Resolved, encoded: Encoded) -> None:
        """Keep a new conditioning."""
        self._remember(request, encoded)
        if (on_disk := self._on_disk) is not None:
            on_disk.keep(*encoded, self._settings(request))

    def clear(self) -> None:
        """Drop the conditioning in memory."""
        self._in_memory.clear()

    @contextlib.contextmanager
    def bypassed(self) -> Iterator[None]:
        """Reuse nothing of before, and keep nothing: a probe sees real work."""
        self.clear()
        self._is_bypassed = True
        try:
            yield
        finally:
            self._is_bypassed = False
            self.clear()

    def _key(self, request: Resolved) -> tuple[Any, ...]:
        return tuple(getattr(request, name) for name in self._model.encode_reads)

    def _remember(self, request: Resolved, known: Encoded) -> None:
        key = self._key(request)
        self._in_memory.pop(key, None)
        while len(self._in_memory) >= KEPT_IN_MEMORY:
            self._in_memory.pop(next(iter(self._in_memory)))
        self._in_memory[key] = known

    def _settings(self, request: Resolved) -> dict[str, Any]:
        """Return the settings that a conditioning depends on, as JSON types."""
        settings = {name: getattr(request.request, name) for name in self._model.encode_reads}
        if settings.get("image"):
            settings["image"] = [image.pixels_sha256 for image in request.image]
        return settings

    @property
    def _on_disk(self) -> PromptCache | None:
        if self._folder is None or self._is_bypassed:
            return None
        return PromptCache(self._folder, {"made_by": _made_by(self._origin())})


def _made_by(origin: Provenance) -> list[Any]:
    """Return whatever the numbers depend on beside the request."""
    kernels = (origin.attention, origin.device["fused"], origin.device["deterministic"])
    return [
        origin.model["fingerprint"], origin.dtypes, origin.versions, kernels,
        origin.device["chip"], origin.device["threads"], origin.device["software"],
    ]  # fmt: skip


class PromptCache:
    """A folder with one file for each prompt."""

    def __init__(self, folder: Path, made_by: Mapping[str, Any]) -> None:
        """Keep the place.

        Args:
            folder: made when something is first kept.
            made_by: whatever the numbers depend on beside the request: weights, dtypes, kernels.
        """
        self._folder = folder
        self._made_by = made_by

    def _place(self, asked: Mapping[str, Any]) -> Path:
        text = json.dumps([self._made_by, asked], sort_keys=True, ensure_ascii=False, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self._folder / f"{digest}{_SUFFIX}"

    def find(self, kind: Any, asked: Mapping[str, Any]) -> Encoded | None:
        """Return a conditioning and its notes, or None if it is not there whole.

        Args:
            kind: class of the conditioning, of tensors and tuples of tensors.
            asked: the settings that it depends on.
        """
        from safetensors import SafetensorError, safe_open

        place = self._place(asked)
        try:
            with safe_open(place, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            fields = {
                name: found[name]
                if count is None
                else tuple(found[f"{name}.{number}"] for number in range(count))
                for name, count in about["fields"].items()
            }
            conditioning = kind(**fields)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None  # not there, or not whole: it is made again
        with contextlib.suppress(OSError):
            os.utime(place)
        return conditioning, tuple(about["notes"])

    def keep(self, conditioning: Any, notes: tuple[str, ...], asked: Mapping[str, Any]) -> None:
        """Write a conditioning; a folder that cannot be written is done without."""
        from safetensors.torch import save

        tensors: dict[str, Any] = {}
        fields: dict[str, int | None] = {}
        for name, value in vars(conditioning).items():
            if isinstance(value, tuple):
                fields[name] = len(value)
                tensors |= {f"{name}.{i}": one.cpu().contiguous() for i, one in enumerate(value)}
            else:
                fields[name] = None
                tensors[name] = value.cpu().contiguous()
        about = json.dumps({"fields": fields, "notes": notes})
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with write_whole(self._place(asked), mode=0o600) as file:
                file.write(save(tensors, {"about": about}))
            self._forget_old()

    def _forget_old(self) -> None:
        now = time.time()

        def used(path: Path) -> float:
            when = path.stat().st_mtime
            return when if when <= now + _SLACK_SECONDS else 0.0  # of a clock that was wrong

        files = sorted(self._folder.glob(f"*{_SUFFIX}"), key=used)
        for path in files[:-KEPT]:
            path.unlink(missing_ok=True)
