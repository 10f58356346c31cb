"""Does the picture stay the same with each switch of memory and speed?

A switch is judged like a device: against the run without it, in the same dtype, by the same rule
(`parity`): identical, close or different.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from danqing.verify.joints import compare_traces
from danqing.verify.metrics import compare
from danqing.verify.parity import judge
from danqing.verify.runs import run, spent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from danqing.generation import Picture
    from danqing.runner import Probed
    from danqing.verify.parity import Baseline

DIFFERENT = "different"


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What one switch does.

    Attributes:
        name: as a user would ask for it.
        rung: `identical`, `close`, `alike` or `different`; None if it is not to be had here.
        note: why it is not to be had, or where it differs first.
        psnr: of the picture with it against that without, in dB.
        seconds: of the picture, loading left out.
        peak_bytes: the most memory of any stage, where it is known.
    """

    name: str
    rung: str | None
    note: str = ""
    psnr: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None

    @property
    def passed(self) -> bool:
        """Whether it changes nothing beyond what rounding costs, or is not to be had."""
        return self.rung in {None, "identical", "close"}


def check_invariance(
    baseline: Baseline, switches: Mapping[str, Callable[[], Probed]], *, batch: int = 2
) -> tuple[Switch, ...]:
    """Judge each switch, a batch, and a prompt that was read before.

    Args:
        baseline: of the run without any.
        switches: name to what opens the engine with that switch on.
        batch: pictures computed together.

    Raises:
        DanqingError: what opens one raises anything but that it is not to be had here.
    """
    found = [_judge(baseline, name, opened) for name, opened in switches.items()]
    found.append(_in_a_batch(baseline, batch))
    found.append(_read_before(baseline))
    return tuple(found)


def _judge(baseline: Baseline, name: str, opened: Callable[[], Probed]) -> Switch:
    from danqing.errors import DeviceError, DoesNotFitError

    try:
        verdict = judge(baseline, opened)
    except (DeviceError, DoesNotFitError) as error:
        return Switch(name=name, rung=None, note=error.what)
    first = next((joint for joint in verdict.joints if not joint.identical), None)
    return Switch(
        name=name,
        rung=verdict.rung or DIFFERENT,
        note="" if first is None else f"first at {first.name}",
        psnr=verdict.picture.psnr,
        seconds=spent(verdict.candidate),
        peak_bytes=_peak(verdict.candidate),
    )


def _in_a_batch(baseline: Baseline, size: int) -> Switch:
    """Compare the first picture of a batch; close is judged by its picture alone.

    A batch's joints cannot be forced: its other pictures have no reference.
    """
    runs = baseline.runs
    engine = runs.reference()
    place = baseline.folder / "batch.trace"
    trace, picture = run(engine, runs.request.request.replace(num_images_per_prompt=size), place)
    engine.close()
    found = compare_traces(trace, baseline.base)
    first = found.first_divergence
    away = compare(picture.image, baseline.image)
    rung = "identical" if found.identical else "alike"
    if rung == "alike" and away.psnr < min(baseline.precision.psnr, 60.0) - 3:
        rung = DIFFERENT
    return Switch(
        name=f"batch of {size}",
        rung=rung,
        note="" if first is None else f"first at {first.name}",
        psnr=away.psnr,
        seconds=spent(picture) / size,
        peak_bytes=_peak(picture),
    )


def _read_before(baseline: Baseline) -> Switch:
    """Paint another seed of the prompt, then this one, whose conditioning is then reused."""
    runs = baseline.runs
    engine = runs.reference()
    engine.generate(runs.request.request.replace(seed=runs.request.seed ^ 1))
    (picture,) = engine.generate(runs.request).pictures
    engine.close()
    away = compare(picture.image, baseline.image)
    return Switch(
        name="conditioning reused",
        rung="identical" if away.largest == 0 else DIFFERENT,
        note="its pixels",
        psnr=away.psnr,
        seconds=spent(picture),
        peak_bytes=_peak(picture),
    )


def _peak(picture: Picture) -> int | None:
    peaks = [stage.peak_bytes for stage in picture.stages if stage.peak_bytes is not None]
    return max(peaks, default=None)
