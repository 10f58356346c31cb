"""`danqing doctor --paint`: does this device paint the right picture?"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.cli.opening import open_engine
from danqing.cli.terminal import print_json
from danqing.errors import BrokenPictureError
from danqing.models import open_checkpoint
from danqing.pictures import check_target
from danqing.weights import POCKET

if TYPE_CHECKING:
    from danqing.cli.jobs.doctor import Examination
    from danqing.engine import Engine
    from danqing.pocket.suite import Outcome


def run(job: Examination) -> None:
    """Paint the pocket suite and print what it shows.

    Raises:
        BrokenPictureError: a picture does not show its prompt, or is too far from its reference.
    """
    keep, as_json = job.keep, job.as_json
    if keep is not None:
        check_target(Path(keep) / "name.png", pixels=0)
    with open_engine(open_checkpoint(POCKET), job.options) as engine:
        if not as_json:
            print(_heading(engine))
        started = time.monotonic()
        outcomes = [_told(outcome, keep, as_json=as_json) for outcome in _paint(engine)]
        seconds = time.monotonic() - started
        failed = [outcome for outcome in outcomes if not outcome.passed]
        if as_json:
            print_json(_report(outcomes, seconds), indent=2)
        else:
            print(_verdict(engine, outcomes, seconds))
    if failed:
        raise BrokenPictureError(
            "this device does not paint the right pictures",
            seen=f"{len(failed)} of {len(outcomes)} failed: "
            + ", ".join(outcome.case.name for outcome in failed),
            hint="try --dtype float32; --keep FOLDER keeps the pictures to look at",
        )


def _paint(engine: Engine) -> Any:
    from danqing.pocket import suite

    return suite.paint(engine)


def _heading(engine: Engine) -> str:
    from danqing.pocket.suite import least_psnr

    plan = engine.plan
    limit = least_psnr(plan.dtype)
    return (
        f"pocket suite on {plan.device} in {plan.dtype}; "
        f"references: CPU, float32; limit: {limit:.1f} dB\n"
        f"{'':8}{'case':22}{'PSNR dB':>9}{'SSIM':>9}{'largest':>9}  shows the prompt"
    )


def _told(outcome: Outcome, keep: str | None, *, as_json: bool) -> Outcome:
    if keep is not None:
        outcome.picture.save(Path(keep) / f"{outcome.case.name}.png", overwrite=True)
    if not as_json:
        away = outcome.difference
        shown = "yes" if outcome.shown else "NO"
        print(
            f"{'passed' if outcome.passed else 'FAILED':8}{outcome.case.name:22}"
            f"{away.psnr:9.2f}{away['ssim']:9.5f}{away.largest:9d}  {shown}"
        )
        sys.stdout.flush()
    return outcome


def _verdict(engine: Engine, outcomes: list[Outcome], seconds: float) -> str:
    passed = sum(outcome.passed for outcome in outcomes)
    shown = sum(outcome.shown for outcome in outcomes)
    same = sum(outcome.difference.largest == 0 for outcome in outcomes)
    return (
        f"{passed} of {len(outcomes)} passed on {engine.plan.device}: {shown} show their prompt, "
        f"{same} are identical to the reference; {seconds:.1f} s with loading"
    )


def _report(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    origin = outcomes[0].picture.provenance
    return {
        "passed": all(outcome.passed for outcome in outcomes),
        "device": dict(origin.device),
        "dtype": origin.dtype,
        "model": dict(origin.model),
        "versions": dict(origin.versions),
        "seconds": round(seconds, 3),
        "cases": [outcome.as_dict() for outcome in outcomes],
    }
