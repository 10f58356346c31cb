"""Everything that can be said of a checkpoint before a weight is used, component by component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from danqing import models
from danqing.errors import CheckpointDamagedError, CheckpointError, DanqingError
from danqing.weights import PART

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from danqing.models.base import ModelSpec
    from danqing.weights import Checkpoint, Component


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one component.

    Attributes:
        name: of the component.
        style: whose tensor names it uses; `files` of one without tensors; empty if it is missing.
        place: its folder, or its only file.
        files: with tensors.
        tensors: how many.
        dtype: the dtype most of its bytes are in.
        bytes: of all tensors.
        fault: why it cannot be used; None if it can.
        notes: what was ignored in its small files, and why.
    """

    name: str
    style: str
    place: str
    files: tuple[Path, ...]
    tensors: int
    dtype: str
    bytes: int
    fault: DanqingError | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was found of a whole checkpoint.

    Attributes:
        spec: which model it is; None if that cannot be said.
        findings: of each component it needs.
        fault: what is wrong with all of them together; None if nothing is.
    """

    spec: ModelSpec | None
    findings: tuple[Finding, ...]
    fault: DanqingError | None

    @property
    def sound(self) -> bool:
        """Whether it can be run."""
        return self.fault is None and not any(finding.fault for finding in self.findings)


def preflight(checkpoint: Checkpoint, *, values: bool = False) -> Preflight:
    """Check a checkpoint; nothing is raised for what is wrong with it.

    Args:
        checkpoint: opened.
        values: read every tensor, too, and look for values that are not finite.
    """
    if checkpoint.layout == PART:
        return _preflight_part(checkpoint, values=values)
    try:
        spec = models.identify(checkpoint)
    except CheckpointError as error:
        names = (*checkpoint.components, *checkpoint.broken)
        return Preflight(
            spec=None,
            findings=tuple(_look(checkpoint, name, _nothing, values=values) for name in names),
            fault=error,
        )
    model = models.make_model(checkpoint, spec)
    findings = tuple(
        _look(checkpoint, name, model.check_part, model.notes_of, values=values)
        for name in model.parts
    )
    fault = None
    if not any(finding.fault for finding in findings):
        fault = _fault_of(model.check_together)
    return Preflight(spec=spec, findings=findings, fault=fault)


def _preflight_part(checkpoint: Checkpoint, *, values: bool) -> Preflight:
    """Compare components with those of the family that they fit best."""
    model = models.make_model_around(checkpoint)
    findings = tuple(
        _look(checkpoint, name, model.check_part, model.notes_of, values=values)
        for name in checkpoint.components
    )
    return Preflight(spec=None, findings=findings, fault=None)


def _look(
    checkpoint: Checkpoint,
    name: str,
    check: Callable[[str], None],
    notes_of: Callable[[str], tuple[str, ...]] = lambda _: (),
    *,
    values: bool,
) -> Finding:
    fault = _fault_of(lambda: check(name))
    part = checkpoint.components.get(name)
    if part is None:
        where = str(checkpoint.path)
        broken = checkpoint.broken.get(name)
        return Finding(
            name=name, style="", place=where, files=(), tensors=0, dtype="none", bytes=0,
            fault=fault or broken,
        )  # fmt: skip
    if fault is None and values and part.files:
        fault = _fault_of(lambda: _check_values(part))
    try:
        tensors, dtype, size = len(part.entries), part.dtype, part.size_bytes
    except CheckpointError as error:
        tensors, dtype, size, fault = 0, "none", 0, fault or error
    return Finding(
        name=name,
        style=part.style,
        place=str(part.files[0] if len(part.files) == 1 else part.folder),
        files=part.files,
        tensors=tensors,
        dtype=dtype,
        bytes=size,
        fault=fault,
        notes=() if fault is not None else notes_of(name),
    )


def _nothing(_: str) -> None:
    """Check nothing: of an unknown model there is nothing to compare with."""


def _fault_of(check: Callable[[], None]) -> DanqingError | None:
    try:
        check()
    except DanqingError as error:
        return error
    return None


def _check_values(part: Component) -> None:
    """Read every tensor, one after the other, and look for NaN and infinity.

    Raises:
        CheckpointDamagedError: there are some; all tensors that have any are counted.
    """
    bad = []
    for name in part.entries:
        wrong = int((~part.read(name).float().isfinite()).sum())
        if wrong:
            bad.append(f"{name}: {wrong}")
    if bad:
        raise CheckpointDamagedError(
            f"{part.name} has values that are not finite",
            seen=f"{len(bad)} tensors, the first is {bad[0]}",
            hint="the file was damaged, or made so; get it again",
        )
