"""Compares two traces joint by joint, and names the first that differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from danqing.errors import TraceError
from danqing.verify.metrics import Distance, distance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from danqing.verify.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One joint of both traces.

    Attributes:
        name: of the joint.
        identical: same dtype, shape and bytes.
        distance: how far apart; None if one of the traces has digests alone, or shapes differ.
        note: why there is no distance.
    """

    name: str
    identical: bool
    distance: Distance | None
    note: str = ""

    @property
    def stage(self) -> str:
        """The part of the run it belongs to."""
        return self.name.split("/")[0]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two traces side by side.

    Attributes:
        joints: those both have, in the reference's order.
        only: names that one of them lacks.
        settings: of the requests, those that differ: name to (reference, candidate).
    """

    joints: tuple[Compared, ...]
    only: tuple[str, ...]
    settings: Mapping[str, tuple[Any, Any]]

    @property
    def identical(self) -> bool:
        """Whether every joint is the same, bit for bit, and none is missing."""
        return not self.only and all(joint.identical for joint in self.joints)

    @property
    def first_divergence(self) -> Compared | None:
        """The first joint that is not the same."""
        return next((joint for joint in self.joints if not joint.identical), None)


def compare_traces(candidate: Trace, reference: Trace) -> Comparison:
    """Measure every joint; tensors are read one after the other.

    Raises:
        TraceError: they have no joint in common.
    """
    shared = [name for name in reference.joints if name in candidate.joints]
    if not shared:
        heads = (", ".join(list(one.joints)[:3]) for one in (candidate, reference))
        raise TraceError("the traces have nothing in common", seen="; ".join(heads))
    only = tuple(sorted(reference.joints.keys() ^ candidate.joints.keys()))
    asked = [one.about.get("request", {}) for one in (reference, candidate)]
    settings = {
        name: (asked[0].get(name), asked[1].get(name))
        for name in {**asked[0], **asked[1]}
        if asked[0].get(name) != asked[1].get(name)
    }
    return Comparison(
        joints=tuple(_compare(name, candidate, reference) for name in shared),
        only=only,
        settings=settings,
    )


def _compare(name: str, candidate: Trace, reference: Trace) -> Compared:
    one, other = candidate.joints[name], reference.joints[name]
    if one.sha256 == other.sha256:
        return Compared(name=name, identical=True, distance=None)
    if one.shape != other.shape:
        note = f"{list(one.shape)} and {list(other.shape)}"
        return Compared(name=name, identical=False, distance=None, note=note)
    found, wanted = candidate.read(name), reference.read(name)
    if found is None or wanted is None:
        return Compared(name=name, identical=False, distance=None, note="digests alone")
    return Compared(name=name, identical=False, distance=distance(found, wanted))
