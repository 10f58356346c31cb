"""Who answers a request, `Runner`, and what a caller passes to watch it; no torch here.

The engine is one; a pool of processes, of actors on many machines, and a fake in a test are others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from danqing.arrays import Array
    from danqing.generation import Generation, Picture, Progress
    from danqing.request import Request, Resolved

Listener: TypeAlias = "Callable[[Progress], None]"
"""Called with progress; an exception it raises ends the work."""


Probe: TypeAlias = "Callable[[str, Array], Array | None]"
"""Is shown each tensor at the joints of a run; what it returns is taken in its place.

The joints, in order: `encode/NAME`, `draw/NUMBER` (0 is the noise), for each step
`denoise/STEP/velocity` and `denoise/STEP/latents`, and `decode/pixels`."""


Inside: TypeAlias = "Callable[[str, str, int], bool]"
"""Says which layers' outputs a probe is shown too: of a component, by path, and how many times the
layer was called in this run (from 1). Their names are `inside/COMPONENT/PATH/CALL/NUMBER`."""


class Spec(Protocol):
    """What a model takes: `danqing.models.base.ModelSpec`."""

    @property
    def name(self) -> str:
        """Short name, for files."""

    @property
    def title(self) -> str:
        """Name for people."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Value of each setting that a request leaves out."""

    @property
    def takes(self) -> frozenset[str]:
        """Settings that change the images; all others are refused."""

    @property
    def no_effect(self) -> Mapping[str, str]:
        """Settings that would change nothing, each with the reason."""

    @property
    def limits(self) -> Mapping[str, int]:
        """The largest value of some settings."""

    @property
    def size_multiple(self) -> int:
        """Height and width are multiples of it, in pixels."""

    def resolve(self, request: Request) -> Resolved:
        """Fill in what a request leaves out.

        Raises:
            danqing.errors.RequestError: invalid value, or one without effect.
        """
        ...


class Setup(Protocol):
    """Where a model runs: the part of `danqing.plan.Plan` that callers read."""

    @property
    def device(self) -> str:
        """Name of the device."""

    @property
    def chip(self) -> str:
        """Name of the chip, as its driver gives it."""

    @property
    def dtype(self) -> str:
        """Dtype that the model computes in."""

    @property
    def placement(self) -> str:
        """Where idle weights are: resident, staged or streamed."""


class Runner(Protocol):
    """Answers requests of one model; from any thread."""

    @property
    def spec(self) -> Spec:
        """What the model takes."""

    @property
    def plan(self) -> Setup:
        """Where it runs."""

    @property
    def fingerprint(self) -> str:
        """Digest of the weights' headers."""

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of the device: `total`, `free` and `peak`, where known."""

    def load(self, listen: Listener | None = None) -> None:
        """Read the weights now rather than for the first image."""
        ...

    def answers(self) -> bool:
        """Say whether the device computes; a busy one does."""
        ...

    def tokens(self, request: Request | Resolved) -> tuple[int, int, int]:
        """Count the tokens of the prompt, of the images to edit, and of one image made."""
        ...

    def paint(
        self,
        request: Request | Resolved,
        *,
        batch: int = 1,
        listen: Listener | None = None,
        previews: int = 0,
    ) -> Iterator[Picture]:
        """Yield the images of a request as they are finished.

        Args:
            request: resolved, or resolved by `spec` first.
            batch: images computed together.
            listen: called with progress; an exception it raises cancels the rest.
            previews: steps of each image that the listener is shown a preview of, at most.
        """
        ...

    def generate(
        self,
        prompt: str | Request | Resolved,
        /,
        *,
        batch: int = 1,
        listen: Listener | None = None,
        **settings: Any,
    ) -> Generation:
        """Make all images of a request; settings are fields of `Request`."""
        ...

    def close(self) -> None:
        """Free all memory; the next request loads again."""
        ...


class Probed(Runner, Protocol):
    """A runner whose tensors can be seen and replaced: on this machine, in this process."""

    @property
    def stages(self) -> Mapping[str, tuple[str, ...]]:
        """Components that each stage computes with, in the order of the work."""

    def probe(
        self,
        request: Request | Resolved,
        probe: Probe,
        /,
        *,
        inside: Inside | None = None,
        inputs: bool = False,
    ) -> Picture:
        """Make one image and show the joints of the run to a probe.

        Args:
            request: for one image; or for several, computed together: the probe is shown the first.
            probe: is shown the tensors.
            inside: layers whose outputs it is shown, too.
            inputs: show the inputs of these layers as well.
        """
        ...
