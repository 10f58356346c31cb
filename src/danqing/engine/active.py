"""One request under way, as the stages and the step watch see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danqing.engine.probe import Look
    from danqing.request import Resolved
    from danqing.runner import Listener


@dataclass(frozen=True)
class ActiveRequest:
    """One request under way, its prompt encoded.

    Attributes:
        request: with every setting.
        conditioning: what its prompt became.
        notes: for the user.
        listen: hears of progress.
        look: shows tensors to a probe.
        previews: of each image, that the listener is shown.
    """

    request: Resolved
    conditioning: Any
    notes: tuple[str, ...]
    listen: Listener | None
    look: Look
    previews: int = 0
