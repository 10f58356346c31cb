"""Who can answer a request, and what a caller may pass to watch it; no torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from danqing.arrays import Array
    from danqing.generation import Generation, Progress
    from danqing.request import Request

Listener: TypeAlias = "Callable[[Progress], None]"
"""Is told of progress; an exception it raises ends the work."""


Probe: TypeAlias = "Callable[[str, Array], Array | None]"
"""Is shown each tensor at the joints of a run; what it returns is taken in its place.

The joints, in order: `encode/NAME`, `draw/NUMBER` (0 is the noise), for each step
`denoise/STEP/velocity` and `denoise/STEP/latents`, and `decode/pixels`."""


Inside: TypeAlias = "Callable[[str, str, int], bool]"
"""Says which layers' outputs a probe is shown too: of a component, by path, and how many times the
layer was called in this run (from 1). Their names are `inside/COMPONENT/PATH/CALL/NUMBER`."""


class Runner(Protocol):
    """Anything that answers a request: the engine, a pool of machines, a fake in a test."""

    def generate(self, prompt: str | Request, /, **settings: Any) -> Generation:
        """Answer one request."""
        ...
