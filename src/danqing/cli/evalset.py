"""`danqing eval-set`: a benchmark's folder of pictures, for its own scorer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from danqing.cli.generate import (
    Opening,
    Printer,
    open_engine,
    open_weights,
    read_components,
    read_memory,
)
from danqing.cli.progress import make_listener
from danqing.cli.terminal import print_json
from danqing.errors import RequestError
from danqing.evalsets import PROTOCOLS, paint_set
from danqing.files import expand

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """What the command line asked for."""

    name: str
    prompts: str
    out: str
    pictures: str | None
    file_name: str | None
    rules: str | None
    limit: int | None
    batch: int
    model_path: str
    components: Sequence[str]
    allow_pt: bool
    device: str
    dtype: str
    placement: str
    memory: str | None
    quiet: bool
    settings: Mapping[str, Any]


def list_protocols(*, as_json: bool) -> None:
    """Print the benchmarks that are known."""
    if as_json:
        rows = {
            name: {
                "title": one.title, "edits": one.edits, "images": one.images, "file": one.file,
                "settings": one.common,
            }
            for name, one in PROTOCOLS.items()
        }  # fmt: skip
        print_json(rows, indent=2)
        return
    for name, one in PROTOCOLS.items():
        kind = "edits" if one.edits else "words"
        print(f"{name:<14} {one.title:<14} {kind}  {one.images} a prompt  {one.file}")


def run(job: EvalJob) -> None:
    """Paint the benchmark, and say where the pictures are."""
    protocol = PROTOCOLS.get(job.name.lower())
    if protocol is None:
        raise RequestError("there is no such eval set", seen=job.name, allowed=", ".join(PROTOCOLS))
    components = read_components(job.components)
    checkpoint = open_weights(job.model_path, components, allow_pt=job.allow_pt)
    opening = Opening(
        model_path=job.model_path,
        device=job.device,
        dtype=job.dtype,
        components=components,
        placement=job.placement,
        memory=read_memory(job.memory),
    )

    def said(number: int, total: int, there: bool) -> None:
        if not job.quiet:
            print(f"{number} of {total}{': there already' * there}", file=sys.stderr)

    with open_engine(checkpoint, opening) as engine:
        say = Printer(quiet=job.quiet, as_json=False)
        say.plan(engine)
        with make_listener(quiet=job.quiet) as listen:
            painted = paint_set(
                engine,
                protocol,
                prompts=expand(job.prompts),
                out=expand(job.out),
                pictures=expand(job.pictures) if job.pictures else None,
                name=job.file_name,
                rules=job.rules,
                limit=job.limit,
                batch=job.batch,
                settings=job.settings,
                listen=listen,
                on_task=said,
            )
    if not job.quiet:
        print(f"{painted} pictures painted", file=sys.stderr)
    print(job.out)
