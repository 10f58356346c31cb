"""A model: one architecture as three stages, encode, denoise and decode.

The stages are functions of modules and inputs; they hold no state, so that an engine can place,
time and repeat them as it likes. `ModelSpec` is what can be said without loading anything.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from danqing.errors import NoEffectError, RequestError
from danqing.models.slots import STAGES, names_in_stage, names_with_role, required_names
from danqing.request import Request, Resolved
from danqing.validation import allowed_values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from danqing.models.slots import Role, Slot
    from danqing.networks.streaming import Streaming, Unit
    from danqing.weights import Checkpoint

    Modules = Mapping[str, Any]
    OnBytes = Callable[[int], None]
    OnStep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]

RANDOM_SEED_BITS = 32
_ALWAYS = frozenset({"prompt", "seed", "num_images_per_prompt"})
"""Settings that every model takes."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a model is and what it takes; known from the files' headers alone.

    Attributes:
        family: architecture.
        kind: variant within the family, read from the weights.
        title: how it is shown to people.
        defaults: value of each setting that a request leaves out.
        no_effect: settings that would change nothing, each with the reason. A setting that is
            neither here, nor has a default, nor is one of `extras` is refused, too.
        size_multiple: height and width are multiples of it, in pixels.
        limits: the largest value of some settings, where the model's own is below the general one.
        own_name: what it is called, where that is not made of family and kind.
        extras: settings it takes that have no default.
    """

    family: str
    kind: str
    title: str
    defaults: Mapping[str, Any]
    no_effect: Mapping[str, str]
    size_multiple: int
    limits: Mapping[str, int]
    own_name: str | None = None
    extras: frozenset[str] = frozenset()

    @property
    def takes(self) -> frozenset[str]:
        """Settings that change the images; all others are refused."""
        return (_ALWAYS | self.extras | self.defaults.keys()) - self.no_effect.keys()

    @property
    def name(self) -> str:
        """Short name for files: `flux1-schnell`."""
        return self.own_name or f"{self.family}-{self.kind}"

    def resolve(self, request: Request) -> Resolved:
        """Fill in what the request leaves out; draw a seed if neither it nor the model names one.

        Raises:
            NoEffectError: a setting was given that this model would ignore.
            RequestError: a value is beyond this model's limit.
        """
        self._refuse_without_effect(request)
        for name, limit in self.limits.items():
            value = getattr(request, name)
            if value is not None and value > limit:
                low = (allowed_values(Request, name) or "up to").split(" to ")[0]
                raise RequestError(
                    f"{name} is too large for {self.title}",
                    seen=value,
                    allowed=f"{low} to {limit}",
                    setting=name,
                )
        changes = {
            name: value
            for name, value in self.defaults.items()
            if getattr(request, name) is None and name not in self.no_effect
        }
        notes = []
        for name in ("height", "width"):
            asked = changes.get(name, getattr(request, name))
            multiple = self.size_multiple
            changes[name] = max(multiple, asked // multiple * multiple)
            if changes[name] != asked:
                notes.append(
                    f"{name} {asked} is no multiple of {multiple}: {changes[name]} is used"
                )
        filled = request.replace(**changes)
        seed_is_random = filled.seed is None
        if seed_is_random:
            filled = filled.replace(seed=secrets.randbits(RANDOM_SEED_BITS))
        return _resolved(filled, notes=tuple(notes), seed_is_random=seed_is_random)

    def _refuse_without_effect(self, request: Request) -> None:
        """Refuse every setting that is not in `takes`, also those of a `Request` to come."""
        for name in sorted(request.model_fields_set - self.takes):
            value = getattr(request, name)
            if value is None or value == type(request).model_fields[name].default:
                continue
            reason = self.no_effect.get(name, "it does not take this setting")
            raise NoEffectError(
                f"{name} has no effect in {self.title}: {reason}",
                seen=_shown(value),
                hint=f"leave out --{name.replace('_', '-')}",
                setting=name,
            )


def _resolved(request: Request, *, notes: tuple[str, ...], seed_is_random: bool) -> Resolved:
    names = {field.name for field in fields(Resolved)} & type(request).model_fields.keys()
    values = {name: getattr(request, name) for name in names}
    values = {name: value for name, value in values.items() if value is not None}
    return Resolved(request=request, notes=notes, seed_is_random=seed_is_random, **values)


def _shown(value: Any) -> Any:
    return ", ".join(one.name for one in value) if isinstance(value, tuple) else value


class Model(ABC):
    """One opened model; its weights are read by `build`, component by component.

    Attributes:
        slots: its components, and what each one is for.
        encode_reads: settings of a request that its conditioning depends on.
        conditioning: class of what `encode` gives: tensors, and tuples of tensors, by name.
        spec: what it is.
        checkpoint: where its weights are.
    """

    slots: ClassVar[tuple[Slot, ...]]
    encode_reads: ClassVar[tuple[str, ...]]
    conditioning: ClassVar[type]

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        """Keep what `build` needs; nothing is read."""
        self.checkpoint = checkpoint
        self.spec = spec

    def role(self, role: Role) -> tuple[str, ...]:
        """Return the components with a role, in the order of the slots; empty if none has it."""
        return names_with_role(self.slots, role)

    @property
    def stages(self) -> dict[str, tuple[str, ...]]:
        """The components that each stage may need, in the order of the work."""
        return {stage: names_in_stage(self.slots, stage) for stage in STAGES}

    def needs(self, stage: str, request: Resolved) -> tuple[str, ...]:
        """Return the components that a stage needs for this request."""
        return names_in_stage(self.slots, stage, request)

    @property
    def parts(self) -> tuple[str, ...]:
        """The components to check, in order: the required ones, and the others that are present."""
        held = {*self.checkpoint.components, *self.checkpoint.broken}
        required = required_names(self.slots)
        extra = (slot.name for slot in self.slots if not slot.required and slot.name in held)
        return (*required, *extra)

    @abstractmethod
    def check_part(self, name: str) -> None:
        """Compare one component with the architecture: names and shapes, before any is read.

        Raises:
            danqing.errors.CheckpointError: saying all that is wrong with it.
        """

    @abstractmethod
    def check_together(self) -> None:
        """See that the components belong to each other, after each was checked.

        Raises:
            danqing.errors.CheckpointError: they do not.
        """

    @abstractmethod
    def matched(self, component: str) -> tuple[torch.nn.Module, Mapping[str, Any]]:
        """Return a network without weights, and where each of its tensors comes from."""

    def check(self) -> None:
        """Check everything that can be, before any weight is read.

        Raises:
            danqing.errors.CheckpointError: the first thing that is wrong.
        """
        for name in self.parts:
            self.check_part(name)
        self.check_together()

    def notes_of(self, name: str) -> tuple[str, ...]:  # noqa: ARG002
        """Return what was ignored in a component's small files, and why."""
        return ()

    def assumptions(self) -> tuple[str, ...]:
        """Return what the files do not say and was filled in from knowledge of the architecture."""
        return ()

    @abstractmethod
    def dtypes(self, dtype: str) -> dict[str, tuple[str, str]]:
        """Return dtype and reason of each component when the model computes in `dtype`."""

    @abstractmethod
    def build(
        self,
        component: str,
        *,
        dtype: str,
        device: torch.device,
        on_bytes: OnBytes,
        streaming: Streaming | None = None,
    ) -> Any:
        """Read a component's weights and return it ready to compute.

        Args:
            component: one of those named in `stages`.
            dtype: what it computes in.
            device: where it is put.
            on_bytes: told the bytes read so far.
            streaming: if given, its blocks are read when they are needed, but for those that stay.
        """

    @abstractmethod
    def elements(self, component: str) -> int:
        """Return how many numbers of a component's weights are read."""

    @abstractmethod
    def table_elements(self, component: str) -> int:
        """Return how many of them are tables, of which a run looks up a few rows."""

    def units(self, component: str) -> list[tuple[Unit, int]]:  # noqa: ARG002
        """Return what can be streamed of a component, with the bytes of each on disk."""
        return []

    @abstractmethod
    def activations(
        self, request: Resolved, pictures: int, itemsizes: Mapping[str, int]
    ) -> dict[str, int]:
        """Return the bytes that each stage needs beside its weights, at their most.

        Args:
            request: resolved.
            pictures: computed together.
            itemsizes: bytes of a number of each component.
        """

    @abstractmethod
    def forget(self) -> None:
        """Let go of what was kept of earlier requests."""

    @abstractmethod
    def flops(self, request: Resolved, pictures: int) -> dict[str, float]:
        """Return the operations of each stage, roughly; of `denoise` those of one step."""

    @abstractmethod
    def conditioning_size(self, request: Resolved) -> int:
        """Return how many numbers `encode` gives for this request, without running it."""

    @abstractmethod
    def encode(self, modules: Modules, request: Resolved) -> tuple[Any, tuple[str, ...]]:
        """Turn the prompt into conditioning; return it with notes for the user."""

    @abstractmethod
    def draw(self, request: Resolved, seed: int) -> list[torch.Tensor]:
        """Draw everything random of one picture: on the CPU, float32, from this seed alone.

        Returns:
            The initial latents first, then whatever else the model samples.
        """

    @abstractmethod
    def denoise(
        self,
        modules: Modules,
        conditioning: Any,
        drawn: Sequence[Sequence[torch.Tensor]],
        request: Resolved,
        on_step: OnStep,
    ) -> torch.Tensor:
        """Run all steps for a batch of pictures; return latents, one row a picture.

        Args:
            modules: the stage's components, all on one device.
            conditioning: from `encode`.
            drawn: from `draw`, one entry a picture; moved and cast here.
            request: resolved.
            on_step: called after each step with the number of steps done, the latents, and the
                velocity that led to them; it returns the latents to go on with.
        """

    @abstractmethod
    def glimpse(
        self, latents: torch.Tensor, velocity: torch.Tensor, step: int, request: Resolved
    ) -> torch.Tensor:
        """Return the latents that the flow would end in if it went on straight from here.

        Args:
            latents: after a step, as `on_step` is shown them.
            velocity: that led to them.
            step: the number of steps done.
            request: resolved.

        Returns:
            As `denoise`.
        """

    @abstractmethod
    def tokens(self, request: Resolved) -> tuple[int, int, int]:
        """Return the tokens of the prompt, of the pictures to edit, and of a picture painted."""

    @abstractmethod
    def decode(self, modules: Modules, latents: torch.Tensor, request: Resolved) -> torch.Tensor:
        """Turn latents into pixels.

        Returns:
            (pictures, 3, height, width), nominally -1 to 1, not clipped, in the VAE's dtype.
        """
