"""`danqing pull`: download a model's weights, once."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from danqing.cli.terminal import bars
from danqing.quantities import size
from danqing.weights.pull import pull as download

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.cli.jobs.pull import Pulling
    from danqing.weights.hubs import RemoteFile


def run(job: Pulling) -> None:
    """Download, and say where the files are."""

    def show(file: RemoteFile, number: int, count: int) -> None:
        if not job.quiet:
            print(f"{number} of {count}  {size(file.size):>11}  {file.path}", flush=True)

    def plan(count: int, needed: int, cache: Path) -> None:
        if count and not job.quiet:
            print(f"{count} files, {size(needed)}, to {cache}", flush=True)

    with _without_bars(quiet=job.quiet):
        found = download(
            job.repository, source=job.source, revision=job.revision, layout=job.layout,
            include=job.include or [], dry_run=job.dry_run, on_plan=plan, on_file=show,
        )  # fmt: skip
    total = sum(file.size for file in found.files)
    if job.dry_run:
        print(f"{size(found.fetched_bytes)} of {size(total)} would be fetched to {found.path}")
        return
    print(f"{found.path}: {len(found.files)} files, {size(total)}", end="")
    print(f", {size(found.fetched_bytes)} fetched" if found.fetched_bytes else ", all here already")
    if not job.quiet:
        print(f"danqing generate -m {job.repository} ...", file=sys.stderr)


def _without_bars(*, quiet: bool) -> contextlib.AbstractContextManager[object]:
    """Keep the client's progress bars from a terminal that is none, and from the quiet."""
    if not quiet and sys.stderr.isatty():
        return bars()
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    stack = contextlib.ExitStack()
    disable_progress_bars()
    stack.callback(enable_progress_bars)
    return stack
