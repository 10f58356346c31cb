"""`danqing rehearse`: a program on a simulated NPU, and what a real one would refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.cli.scratch import scratch_folder
from danqing.cli.terminal import print_json
from danqing.devices.ascend_chips import CHIPS, chip_named
from danqing.devices.simulated.rehearsal import STOPS
from danqing.errors import RequestError
from danqing.quantities import size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from danqing.cli.jobs.rehearse import Rehearsal

CAUTION = (
    "This was a simulation: the arithmetic was the CPU's. It proves neither the numerics nor the "
    "speed of an NPU."
)
UNCHARGED = (
    "kernels' workspaces are not charged, and blocks are rounded up to 512 bytes on a card: expect "
    "up to a tenth more there"
)


def run(job: Rehearsal) -> int:
    """Run the program in a process of its own, print what was found, and return the exit code.

    Raises:
        RequestError: there is no program, or no such chip.
    """
    words, chip = job.program or [], job.chip
    if not words:
        raise RequestError(
            "there is nothing to rehearse",
            allowed="danqing rehearse -- generate ..., or danqing rehearse -- python SCRIPT ...",
        )
    if words[0].startswith("-"):
        raise RequestError(
            f"unknown option {words[0]}",
            allowed="--chip, --memory, --cards, --json",
            hint="options of the program follow its name: danqing rehearse -- generate ...",
        )
    if words[0] in {"python", "python3"} and (len(words) == 1 or not Path(words[1]).is_file()):
        raise RequestError("script not found", seen=" ".join(words))
    if chip_named(chip) is None:
        known = ", ".join(one.name for one in CHIPS)
        raise RequestError("unknown chip", seen=chip, allowed=known)
    with scratch_folder() as folder:
        place = folder / "findings.json"
        options = ["--chip", chip, "--devices", str(job.cards), "--findings", str(place)]
        options += [] if job.memory is None else ["--memory", str(job.memory)]
        child = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "danqing.devices.simulated.rehearsal", *options, "--", *words],
            check=False,
            # torch must not load a real torch_npu by itself
            env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )
        if not place.is_file():
            return child.returncode or 1
        found = json.loads(place.read_text("utf-8"))
    if job.as_json:
        print_json({**found, "caution": CAUTION}, indent=1)
    else:
        for line in _lines(found):
            print(line, file=sys.stderr)
    stopped = any(one["kind"] in STOPS for one in found["findings"])
    return 1 if stopped else child.returncode


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"rehearsal on a simulated Ascend{found['chip']}"
    for one in found["findings"]:
        yield f"  {one['kind']:<8} {one['what']}"
        if one["place"]:
            inside = f" (in {one['inside']})" if one["inside"] else ""
            yield f"           at {one['place']}{inside}"
    totals = found["totals"]
    yield (
        f"  {found['operators']} different operators in {totals['calls']} calls, "
        f"{totals['waits']} waits for a number; {size(totals['bytes_to_device'])} to the device, "
        f"{size(totals['bytes_to_host'])} back"
    )
    for index, one in enumerate(found["memory"]):
        if one["given"]:
            share = f"{size(one['peak'])} of {size(one['capacity'])}"
            yield f"  npu:{index} needed {share}; {UNCHARGED}"
    if found["exit_code"] and not any(one["kind"] in STOPS for one in found["findings"]):
        yield f"  the program ended by itself, with {found['exit_code']}"
    elif not found["findings"]:
        yield "  nothing that this chip is known to refuse"
    yield CAUTION
