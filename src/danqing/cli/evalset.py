"""`danqing eval-set`: a benchmark's folder of pictures, for its own scorer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from danqing.cli.opening import open_engine, open_weights
from danqing.cli.painting import Printer
from danqing.cli.progress import make_listener
from danqing.cli.terminal import print_json
from danqing.errors import RequestError
from danqing.evalsets import PROTOCOLS, Task, paint_set
from danqing.files import expand

if TYPE_CHECKING:
    from danqing.cli.jobs.eval_set import EvalSet


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


def run(job: EvalSet) -> None:
    """Generate the benchmark's images, and print where they are."""
    if job.name is None or job.prompts is None or job.out is None:
        raise RequestError(
            "an eval set needs a name, prompts and a folder",
            allowed="danqing eval-set NAME --prompts FILE --out FOLDER, or --list",
        )
    protocol = PROTOCOLS.get(job.name.lower())
    if protocol is None:
        raise RequestError("unknown eval set", seen=job.name, allowed=", ".join(PROTOCOLS))
    task = Task(
        protocol=protocol,
        prompts=expand(job.prompts),
        out=expand(job.out),
        pictures=expand(job.pictures) if job.pictures else None,
        name=job.file_name,
        rules=job.rules,
        limit=job.limit,
        batch=job.batch,
        settings=job.settings,
    )
    checkpoint = open_weights(job.model_path, job.options)

    def report(number: int, total: int, there: bool) -> None:
        if not job.quiet:
            print(f"{number} of {total}{': there already' * there}", file=sys.stderr)

    with open_engine(checkpoint, job.options) as engine:
        Printer(quiet=job.quiet, as_json=False).plan(engine)
        with make_listener(quiet=job.quiet) as listen:
            painted = paint_set(engine, task, listen=listen, on_row=report)
    if not job.quiet:
        print(f"{painted} images generated", file=sys.stderr)
    print(job.out)
