"""Conditioning of earlier prompts on disk, so that a prompt that comes again loads no encoder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from danqing.atomic import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

KEPT = 256
"""Prompts; beyond these, those that were not used for longest are removed."""
_SLACK_SECONDS = 60.0
_SUFFIX = ".conditioning.safetensors"


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

    def find(self, kind: Any, asked: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]] | None:
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
