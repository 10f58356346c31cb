"""`danqing check` and `danqing models`: what lies on the disk, and what is wrong with it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from danqing import models
from danqing.cli.opening import open_weights
from danqing.cli.terminal import overwrite, print_json, print_line
from danqing.errors import CheckpointError, CheckpointIncompleteError, DanqingError
from danqing.models.slots import names_with_role
from danqing.quantities import size
from danqing.weights import digests, places

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from danqing.cli.jobs.check import Checking
    from danqing.models.preflight import Finding, Preflight
    from danqing.weights import Checkpoint


def run(job: Checking) -> None:
    """Check a checkpoint and print what was found of each component.

    Raises:
        CheckpointError: it cannot be used.
    """
    from danqing.models.preflight import preflight

    try:
        checkpoint = open_weights(job.place, job.options)
    except CheckpointIncompleteError:
        if job.options.components:
            raise
        checkpoint = models.open_parts(job.place)  # raises, if it is not even that
    found = preflight(checkpoint, values=job.values)
    sums = _digests(checkpoint, quiet=job.as_json) if job.digest else {}
    if job.as_json:
        print_json(_report(checkpoint, found, sums), indent=2)
    else:
        for line in _table(checkpoint, found, sums):
            print_line(line)
    faults = [finding.fault for finding in found.findings if finding.fault]
    for fault in (found.fault, *faults):
        if fault is not None:
            raise fault


def _digests(checkpoint: Checkpoint, *, quiet: bool) -> dict[Path, str]:
    sums: dict[Path, str] = {}
    for path in _files(checkpoint):
        total = path.stat().st_size

        def show(done: int, path: Path = path, total: int = total) -> None:
            if not quiet and sys.stderr.isatty():
                end = "\n" if done == total else ""
                overwrite(f"{path.name}: {size(done)} of {size(total)}", end=end)

        sums[path] = digests.sha256(path, show)
    return sums


def _files(checkpoint: Checkpoint) -> list[Path]:
    parts = checkpoint.components.values()
    return list(dict.fromkeys(path for part in parts for path in part.files))


def _table(checkpoint: Checkpoint, found: Preflight, sums: Mapping[Path, str]) -> Iterator[str]:
    title = found.spec.title if found.spec else "no whole model"
    yield f"{title}, {checkpoint.layout}, {checkpoint.path}"
    rows = [("component", "names", "files", "tensors", "dtype", "size", "verdict")]
    for part in found.findings:
        weighed = bool(part.files)
        rows.append(
            (
                part.name,
                part.style or "-",
                str(len(part.files)) if weighed else "-",
                str(part.tensors) if weighed else "-",
                part.dtype if weighed else "-",
                size(part.bytes) if weighed else "-",
                "ok" if part.fault is None else f"FAULTY: {part.fault.what}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        yield "  ".join([*cells, row[-1]])
    for part in found.findings:
        yield from (f"note: {note}" for note in part.notes)
    for path, error in checkpoint.unread.items():
        yield f"not read: {path.name}: {error.what}"
    for path, digest in sums.items():
        known = f"  ({digests.KNOWN[digest]}, as published)" if digest in digests.KNOWN else ""
        yield f"sha256 {digest}  {path}{known}"
    total = sum(part.bytes for part in found.findings)
    verdict = "sound" if found.sound else "NOT USABLE"
    yield f"{verdict}: {size(total)} in {len(_files(checkpoint))} files"


def _report(checkpoint: Checkpoint, found: Preflight, sums: Mapping[Path, str]) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "layout": checkpoint.layout,
        "model": found.spec.name if found.spec else None,
        "title": found.spec.title if found.spec else None,
        "sound": found.sound,
        "fault": _fault(found.fault),
        "components": [_row(part) for part in found.findings],
        "sha256": {str(path): digest for path, digest in sums.items()},
        "known": {str(p): digests.KNOWN[d] for p, d in sums.items() if d in digests.KNOWN},
    }


def _row(part: Finding) -> dict[str, Any]:
    return {
        "name": part.name,
        "names": part.style,
        "place": part.place,
        "files": [str(path) for path in part.files],
        "tensors": part.tensors,
        "dtype": part.dtype,
        "bytes": part.bytes,
        "ok": part.fault is None,
        "fault": _fault(part.fault),
        "notes": list(part.notes),
    }


def _fault(error: DanqingError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {
        "kind": type(error).__name__,
        "what": error.what,
        "seen": error.seen,
        "allowed": error.allowed,
        "hint": error.hint,
    }


# --- danqing models ------------------------------------------------------------------------------


def run_models(*, everything: bool, as_json: bool) -> None:
    """List the models on this disk; with `everything`, those danqing does not know too."""
    rows = [_model_row(found) for found in places.all_places()]
    shown = [row for row in rows if everything or row["model"]]
    if as_json:
        print_json(shown, indent=2)
        return
    table = [("name", "model", "layout", "size", "dtype", "verdict")]
    table += [
        (
            row["name"], row["model"] or "-", row["layout"] or "-",
            size(row["bytes"]) if row["bytes"] else "-", row["dtype"] or "-", row["verdict"],
        )
        for row in shown
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=True)]
        print_line("  ".join([*cells, line[-1]]))
    if hidden := len(rows) - len(shown):
        print(f"{hidden} other places hold no model danqing runs; --all lists them")
    looked = [*places.named_folders(), places.hugging_face_cache(), places.model_scope_cache()]
    print(f"looked in: {', '.join(str(place) for place in looked)}")
    if not places.named_folders():
        print(f"{places.MODELS_VARIABLE}=FOLDER:... names more folders")


def _model_row(found: places.Found) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": found.name, "path": str(found.path), "model": None, "layout": None, "bytes": 0,
        "dtype": None, "complete": False, "verdict": "",
    }  # fmt: skip
    try:
        checkpoint = models.open_checkpoint(found.path)
        row["layout"] = checkpoint.layout
        spec = models.identify(checkpoint)
        row["model"] = spec.name
        row["bytes"] = sum(part.size_bytes for part in checkpoint.components.values())
        denoiser = names_with_role(models.slots_of(spec), "denoiser")[0]
        row["dtype"] = checkpoint.component(denoiser).dtype
        for name in models.parts_of(spec):
            checkpoint.component(name)
    except CheckpointError as error:
        row["verdict"] = error.what
    else:
        row |= {"complete": True, "verdict": "complete"}
    return row
