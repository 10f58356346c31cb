"""Does this device compute what that one does? Error by joint, judged by what precision costs.

A *reference* runs in the same dtype as the *candidate*; an *exact* run is the CPU in float32. All
have the same noise. The candidate runs twice: free, so that its drift is seen as a user sees it;
and forced, every stage and step given the reference's own input, so that each joint's error is its
own.

The noise floor of a joint is what the dtype costs there anyway: the reference, forced by the exact
run, against the exact run. In float32, where that is nothing, it is what moving every forced input
by one unit in the last place does, and at least `LEAST`. The rule: a joint may be off by `FACTOR`
times its floor. Errors are relative L2 norms.

When a joint is beyond its limit, the search goes on inside the network it comes from, in the same
way: first by blocks, then by the layers of the first block that fails.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from danqing.arrays import Array
from danqing.errors import TraceError
from danqing.verify.metrics import Difference, Statistics, compare, distance, statistics_of
from danqing.verify.runs import about
from danqing.verify.trace import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from PIL.Image import Image

    from danqing.generation import Picture
    from danqing.request import Resolved
    from danqing.runner import Inside, Probed
    from danqing.verify.trace import Trace

FACTOR = 3.0
"""Two honest runs in one dtype are about 1.4 floors apart, their roundings being independent."""
LEAST = 2e-6
"""Floor of any joint, relative: float32 sums of thousands of terms in another order."""
MARGIN_DB = 3.0
"""By how much the free picture may be farther off than precision alone puts it."""
PIXELS = "decode/pixels"
RUNGS = ("identical", "close", "alike")


@dataclass(frozen=True, kw_only=True)
class JointVerdict:
    """One joint of the forced run.

    Attributes:
        name: of the joint.
        port: relative L2 error of the candidate against the reference, both given the same input.
        precision: the floor: what the dtype costs there.
        limit: what `port` may be.
        drift: relative L2 error of the candidate's free run against the reference's.
        identical: whether the free runs have the same bits there.
    """

    name: str
    port: float
    precision: float
    limit: float
    drift: float
    identical: bool

    @property
    def stage(self) -> str:
        """The part of the run it belongs to."""
        return self.name.split("/")[0]

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit; what is not finite is not."""
        return self.port <= self.limit


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The verdict.

    Attributes:
        joints: all that are judged, in order; the noise is not.
        candidate: the candidate's free picture and what made it.
        reference: the reference's trace.
        picture: the candidate's picture against the reference's.
        precision: the reference's picture against the exact one: what the dtype alone costs.
        image: the reference's picture.
        culprit: the first layer that fails, if a joint did and the search found one.
        inputs: what that layer was given, in the reference's run: name and values.
        search: how it got there.
    """

    joints: tuple[JointVerdict, ...]
    candidate: Picture
    reference: Trace
    picture: Difference
    precision: Difference
    image: Image
    culprit: str | None = None
    inputs: tuple[tuple[str, Statistics], ...] = ()
    search: tuple[str, ...] = ()

    @property
    def first_failure(self) -> JointVerdict | None:
        """The first joint beyond its limit."""
        return next((joint for joint in self.joints if not joint.passed), None)

    @property
    def rung(self) -> str | None:
        """The best of `RUNGS` that it reached; None if not even the pictures are alike."""
        if all(joint.identical for joint in self.joints):
            return "identical"
        if self.first_failure is None:
            return "close"
        least = min(self.precision.psnr, 60.0) - MARGIN_DB
        return "alike" if self.picture.psnr >= least else None

    def reaches(self, rung: str) -> bool:
        """Say whether it is at least as good as a rung."""
        return self.rung is not None and RUNGS.index(self.rung) <= RUNGS.index(rung)


def check_parity(
    *,
    exact: Callable[[], Probed],
    reference: Callable[[], Probed],
    candidate: Callable[[], Probed],
    request: Resolved,
    folder: Path,
) -> Parity:
    """Run exact, reference and candidate, one after the other, and judge every joint.

    Each is opened when its turn comes and closed after it, so that one at a time is in memory.

    Args:
        exact: opens the CPU in float32.
        reference: opens the reference, in the candidate's dtype.
        candidate: opens what is judged.
        request: for one picture.
        folder: for the traces, which the caller removes.
    """
    return judge(prepare(exact, reference, request=request, folder=folder), candidate)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What candidates are judged against; made once for all of them.

    Attributes:
        base: the reference's trace.
        image: its picture.
        floors: of each joint.
        precision: what the dtype alone costs the picture.
    """

    base: Trace
    image: Image
    floors: Mapping[str, float]
    precision: Difference
    runs: _Runs
    folder: Path


def prepare(
    exact: Callable[[], Probed], reference: Callable[[], Probed], *, request: Resolved, folder: Path
) -> Baseline:
    """Run the exact one and the reference, and measure the floors."""
    runs = _Runs(exact=exact, reference=reference, request=request, folder=folder)
    truth, truth_picture = runs.run(exact, "exact")
    base, picture = runs.run(reference, "reference")
    return Baseline(
        base=base,
        image=picture.image,
        floors=runs.floors(truth),
        precision=compare(picture.image, truth_picture.image),
        runs=runs,
        folder=folder,
    )


def prepare_from_trace(
    trace: Trace,
    exact: Callable[[], Probed],
    here: Callable[[], Probed],
    *,
    request: Resolved,
    folder: Path,
) -> Baseline:
    """Take a trace, of another machine perhaps, as the reference.

    Args:
        trace: with its tensors.
        exact: opens the CPU in float32.
        here: opens the CPU in the candidate's dtype: the floors come from it, and it stands in for
            the reference when the search goes on inside a network, of which a trace says nothing.
        request: the trace's.
        folder: for the traces, which the caller removes.

    Raises:
        TraceError: the trace has digests alone.
    """
    pixels = trace.read(PIXELS) if PIXELS in trace.joints else None
    if pixels is None:
        raise TraceError(
            "a trace of digests alone cannot be a reference",
            seen=trace.path,
            hint="make it again without --digests",
        )
    runs = _Runs(exact=exact, reference=here, request=request, folder=folder)
    truth, truth_picture = runs.run(exact, "exact", teacher=_noise_of(trace))
    _, here_picture = runs.run(here, "here", teacher=_noise_of(trace))
    return Baseline(
        base=trace,
        image=to_image(pixels),
        floors=runs.floors(truth),
        precision=compare(here_picture.image, truth_picture.image),
        runs=runs,
        folder=folder,
    )


def judge(baseline: Baseline, candidate: Callable[[], Probed]) -> Parity:
    """Run a candidate free and forced, and judge every joint; look inside if one fails."""
    runs, base = baseline.runs, baseline.base
    free, picture = runs.run(candidate, "free", teacher=_noise_of(base))
    own = free
    if not all(_same(free, base, name) for name in _judged(base)):
        own, _ = runs.run(candidate, "forced", teacher=_or_none(base))
    joints = tuple(
        JointVerdict(
            name=name,
            port=_off(own, base, name),
            precision=baseline.floors[name],
            limit=FACTOR * baseline.floors[name],
            drift=_off(free, base, name),
            identical=_same(free, base, name),
        )
        for name in _judged(base)
    )
    failed = next((joint for joint in joints if not joint.passed), None)
    found = _Search() if failed is None else _drill(runs, candidate, base, failed.name)
    return Parity(
        joints=joints,
        candidate=picture,
        reference=base,
        picture=compare(picture.image, baseline.image),
        precision=baseline.precision,
        image=baseline.image,
        culprit=found.culprit,
        inputs=found.inputs,
        search=tuple(found.log),
    )


def to_image(pixels: Array) -> Image:
    """Turn the first of (pictures, 3, height, width), -1 to 1, into 8 bits, as the engine does."""
    from PIL import Image as Images

    unit = (pixels.values()[0].astype(np.float32) / 2 + np.float32(0.5)).clip(0, 1)
    levels = (unit * 255).round().astype(np.uint8)
    return Images.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """Opens, runs and closes; one engine at a time is in memory."""

    exact: Callable[[], Probed]
    reference: Callable[[], Probed]
    request: Resolved
    folder: Path
    stages: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Components of each stage, known once an engine was opened."""

    def run(
        self,
        opened: Callable[[], Probed],
        name: str,
        *,
        teacher: Callable[[str], Array | None] = lambda _: None,
        change: Callable[[str, Array], Array] = lambda _, array: array,
        inside: Inside | None = None,
        inputs: bool = False,
    ) -> tuple[Trace, Picture]:
        """Run the request, keep what it computes, and let it go on with a teacher's tensors."""
        engine = opened()
        self.stages.update(engine.stages)
        with Recorder(self.folder / f"{name}.trace") as recorder:

            def probe(name: str, array: Array) -> Array | None:
                recorder(name, array)
                given = teacher(name)
                return None if given is None else change(name, given)

            picture = engine.probe(self.request, probe, inside=inside, inputs=inputs)
            engine.close()
            return recorder.finish(about(picture)), picture

    def components_of(self, stage: str) -> list[str]:
        """Return the components that a stage's joints come from, without those used later too."""
        stages = list(self.stages)
        later = stages[stages.index(stage) + 1 :]
        used_later = {name for other in later for name in self.stages[other]}
        return [name for name in self.stages[stage] if name not in used_later]

    def floors(self, truth: Trace, *, inside: Inside | None = None) -> dict[str, float]:
        """Return the floor of each joint: what precision costs there, given the exact inputs."""
        teach = _or_none(truth)
        forced, _ = self.run(self.reference, "floor", teacher=teach, inside=inside)
        if _dtype(forced) == "float32":
            forced, _ = self.run(self.exact, "floor", teacher=teach, change=_moved, inside=inside)
        return {name: max(_off(forced, truth, name), LEAST) for name in _judged(truth)}


# --- which layer ---------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Search:
    """What a search found, and how."""

    culprit: str | None = None
    inputs: tuple[tuple[str, Statistics], ...] = ()
    log: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer, and which of its calls."""

    component: str
    path: str
    call: int


def _drill(runs: _Runs, candidate: Callable[[], Probed], base: Trace, joint: str) -> _Search:
    """Find the first layer that fails on the way to a joint, and what it was given."""
    stage, _, rest = joint.partition("/")
    components = runs.components_of(stage)
    # a lone denoiser is called once a step; of several, each may skip steps, so all calls count
    call = int(rest.split("/")[0]) if stage == "denoise" and len(components) == 1 else None

    def here(component: str, times: int) -> bool:
        return component in components and times == (call or times)

    found = _Search(log=[f"{joint} is the first joint beyond its limit"])
    look = partial(_first_inside, runs, candidate, base, log=found.log)
    block = look(lambda c, path, n: here(c, n) and is_block(path))
    if block is None:
        return found
    path = block.path
    layer = look(
        lambda c, p, n: (
            c == block.component and here(c, n) and (p == path or p.startswith(f"{path}."))
        )
    )
    culprit = layer or block
    found.culprit = f"{culprit.component}/{culprit.path}"
    found.inputs = _inputs_of(runs, base, culprit)
    return found


def _inputs_of(runs: _Runs, base: Trace, layer: _Layer) -> tuple[tuple[str, Statistics], ...]:
    """Run the reference once more, and see what a layer is given there."""
    wanted = (layer.component, layer.path, layer.call)
    seen, _ = runs.run(
        runs.reference,
        "inputs",
        teacher=_or_none(base),
        inside=lambda *this: this == wanted,
        inputs=True,
    )
    given = [name for name in seen.joints if name.startswith("inside/") and "/in/" in name]
    arrays = ((name.partition("/in/")[2], seen.read(name)) for name in given)
    return tuple((name, statistics_of(array)) for name, array in arrays if array is not None)


def is_block(path: str) -> bool:
    """Say whether a layer is a block: a numbered one outside others, or one that has no number."""
    numbers = [word for word in path.split(".") if word.isdigit()]
    return not numbers or (len(numbers) == 1 and path.rsplit(".", 1)[-1].isdigit())


def _first_inside(
    runs: _Runs,
    candidate: Callable[[], Probed],
    base: Trace,
    inside: Inside,
    *,
    log: list[str],
) -> _Layer | None:
    """Return the first layer beyond its limit, given the reference's inputs.

    Each layer's output is put right after it was seen, so that the next one's error is its own; a
    layer that holds others comes after them, and answers only for what it does itself.
    """
    teach = _or_none(base)
    truth, _ = runs.run(runs.exact, "inside-exact", teacher=teach, inside=inside)
    floors = runs.floors(truth, inside=inside)
    right, _ = runs.run(runs.reference, "inside-reference", teacher=teach, inside=inside)
    own, _ = runs.run(candidate, "inside", teacher=_or_none(right), inside=inside)
    looked_at = [name for name in right.joints if name.startswith("inside/")]
    for name in looked_at:
        if name not in own.joints:
            continue  # it was not run: what should have run it answers for that
        off, limit = _off(own, right, name), FACTOR * floors.get(name, LEAST)
        if off > limit:
            _, component, *path, call, _number = name.split("/")
            log.append(
                f"{component}/{'/'.join(path)}: {off:.2e}, limit {limit:.2e}; first of "
                f"{len(looked_at)} looked at"
            )
            return _Layer(component=component, path="/".join(path), call=int(call))
    log.append(f"none of {len(looked_at)} layers is beyond its limit")
    return None


def _same(trace: Trace, other: Trace, name: str) -> bool:
    return name in trace.joints and trace.joints[name].sha256 == other.joints[name].sha256


def _or_none(trace: Trace) -> Callable[[str], Array | None]:
    return lambda name: trace.read(name) if name in trace.joints else None


def _dtype(trace: Trace) -> str:
    return str(trace.about["provenance"]["dtype"])


def _judged(trace: Trace) -> list[str]:
    return [name for name in trace.joints if not name.startswith("draw/")]


def _noise_of(trace: Trace) -> Callable[[str], Array | None]:
    return lambda name: trace.read(name) if name.startswith("draw/") else None


def _moved(name: str, array: Array) -> Array:
    """Move every value by one unit in the last place, up or down, by a fixed coin for each."""
    if array.dtype not in ("float32", "float64"):
        return array
    random = np.random.default_rng([len(name), *name.encode()])
    towards = np.where(random.random(array.bits.shape) < 0.5, -np.inf, np.inf)  # noqa: PLR2004
    return Array(array.dtype, np.nextafter(array.bits, towards.astype(array.bits.dtype)))


def _off(trace: Trace, reference: Trace, name: str) -> float:
    """Return the relative L2 error of a joint; infinite where it is missing or not finite."""
    if name not in trace.joints or trace.joints[name].shape != reference.joints[name].shape:
        return math.inf
    if trace.joints[name].sha256 == reference.joints[name].sha256:
        return 0.0
    found, wanted = trace.read(name), reference.read(name)
    if found is None or wanted is None:
        return math.inf
    far = distance(found, wanted)
    return math.inf if far.not_finite or math.isnan(far.relative) else far.relative


def report(found: Parity) -> dict[str, Any]:
    """Return the verdict as JSON types."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    bad = found.first_failure
    return {
        "rung": found.rung,
        "first_failure": None if bad is None else bad.name,
        "culprit": found.culprit,
        "inputs": {name: asdict(seen) for name, seen in found.inputs},
        "search": list(found.search),
        "factor": FACTOR,
        "joints": [
            {
                "name": joint.name,
                "passed": joint.passed,
                "port": finite(joint.port),
                "precision": joint.precision,
                "limit": joint.limit,
                "drift": finite(joint.drift),
                "identical": joint.identical,
            }
            for joint in found.joints
        ],
        "picture": found.picture.as_dict(),
        "precision": found.precision.as_dict(),
        "reference": dict(found.reference.about["provenance"]),
        "candidate": found.candidate.record()["provenance"],
    }
