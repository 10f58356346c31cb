"""The components of a model: their configs, networks and small files, checked and read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from danqing.errors import CheckpointDamagedError, CheckpointError, TensorMismatchError
from danqing.models import config_tables, flow, tokenizers
from danqing.models.config_tables import Config, read_config
from danqing.models.kinds import kind_of
from danqing.models.outline import Outline
from danqing.models.slots import STAGES, names_in_stage, names_with_role, required_names
from danqing.turns import LAZY_IMPORTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from danqing.models.base import ModelSpec
    from danqing.models.kinds.base import NetworkKind
    from danqing.models.slots import Role, Slot
    from danqing.networks.loading import Piece
    from danqing.networks.streaming import Streaming
    from danqing.networks.units import Unit
    from danqing.request import Resolved
    from danqing.weights import Checkpoint

    OnBytes = Callable[[int], None]


class Components(ABC):
    """What follows from the slots of a model and from the kinds of its networks.

    Attributes:
        slots: its components, and what each one is for.
        own_kinds: kinds of network that only this family has, or has in its own way.
        known_values: of configs by component, for files that came without one.
        spec: what it is.
        checkpoint: where its weights are.
    """

    slots: ClassVar[tuple[Slot, ...]]
    own_kinds: ClassVar[Mapping[str, NetworkKind]] = {}
    known_values: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        """Keep what is needed to make the networks; nothing is read."""
        self.checkpoint = checkpoint
        self.spec = spec
        self._slot = {slot.name: slot for slot in reversed(self.slots)}
        self._configs: dict[str, Config] = {}
        self._outlines: dict[str, Outline] = {}
        self._files: dict[str, tokenizers.TokenizerFiles] = {}
        self._tokenizers: dict[str, Any] = {}

    # --- what a family says ----------------------------------------------------------------------

    @abstractmethod
    def fits(self) -> Iterable[tuple[str, str, int, int]]:
        """Yield the widths that must agree: component, what it gives, channels, channels wanted."""

    def assumed(self, component: str) -> Mapping[str, Any]:
        """Return values of a config that the family knows, for files that came without one."""
        return self.known_values.get(component, {})

    def assumptions(self) -> tuple[str, ...]:
        """Return what the files do not say and was filled in from knowledge of the architecture."""
        return tuple(note for name in self.parts for note in self.notes_of(name))

    def trim(self, component: str, module: torch.nn.Module) -> torch.nn.Module:  # noqa: ARG002
        """Return a network without the layers that are never computed; they are not read."""
        return module

    def sigmas(self, steps: int) -> list[float] | None:  # noqa: ARG002
        """Return the unshifted noise levels of the steps; None leaves them to the scheduler."""
        return None

    def shift(self, config: Any, tokens: int) -> float:
        """Return mu, for a schedule that shifts by resolution."""
        return flow.shift_of(config, tokens)

    # --- slots -----------------------------------------------------------------------------------

    def role(self, role: Role) -> tuple[str, ...]:
        """Return the components with a role, in the order of the slots; empty if none has it."""
        return names_with_role(self.slots, role)

    @property
    def _denoiser(self) -> str:
        return self.role("denoiser")[0]

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
        extra = (slot.name for slot in self.slots if not slot.required and slot.name in held)
        return (*required_names(self.slots), *extra)

    @property
    def networks(self) -> tuple[str, ...]:
        """The components that compute, in the order of the slots."""
        return tuple(dict.fromkeys(slot.name for slot in self.slots if slot.stage))

    def kind(self, component: str) -> NetworkKind:
        """Return the kind of a network."""
        name = self._slot[component].kind
        return self.own_kinds.get(name) or kind_of(name)

    # --- configs ---------------------------------------------------------------------------------

    def config(self, component: str) -> Config:
        """Return a component's config, read once: the one that came with it, or what is known."""
        if component not in self._configs:
            self._configs[component] = self._read_config(component)
        return self._configs[component]

    def _read_config(self, component: str) -> Config:
        assumed = self.assumed(component)
        if component not in self.role("schedule"):
            part = self.checkpoint.component(component)
            return self.kind(component).read_config(part, assumed)
        given = self.checkpoint.component(component) if component in self.parts else None
        if given is None or given.config is None:
            return Config(values=dict(assumed))
        table = config_tables.SCHEDULE
        return read_config(table, given.config, name=component, place=given.folder)

    def config_of(self, component: str) -> Mapping[str, Any]:
        """Return the values of a component's config."""
        return self.config(component).values

    @property
    def schedule_config(self) -> dict[str, Any]:
        """The schedule that came with the weights, or else the family's."""
        (name,) = self.role("schedule")
        return dict(self.config_of(name))

    def notes_of(self, component: str) -> tuple[str, ...]:
        """Return what was ignored in a component's small files."""
        if component in self.role("tokenizer"):
            return self.tokenizer_files(component).notes
        return self.config(component).notes

    # --- checks ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Check everything that can be, before any weight is read.

        Raises:
            danqing.errors.CheckpointError: the first thing that is wrong.
        """
        for name in self.parts:
            self.check_part(name)
        self.check_together()

    def check_part(self, name: str) -> None:
        """Compare a network with its files; of tokenizer and schedule, see that they are usable.

        Raises:
            danqing.errors.CheckpointError: saying all that is wrong with it.
        """
        if name in self.role("tokenizer"):
            self.tokenizer_files(name)
        elif name in self.role("schedule"):
            self._check_schedule()
        else:
            _ = self.outline(name).module

    def check_together(self) -> None:
        """See that the components belong to each other, after each was checked.

        Raises:
            TensorMismatchError: they do not.
        """
        for slot in self.slots:
            if slot.tokenizer:
                self._check_vocabulary(slot)
        for name, what, seen, wanted in self.fits():
            if seen != wanted:
                raise TensorMismatchError(
                    f"the {name} is not the one this {self._denoiser} was trained with",
                    seen=f"it gives {seen} {what} channels",
                    allowed=f"{wanted}",
                    hint=f"name the right one: --component {name}=PLACE",
                )

    def _check_vocabulary(self, slot: Slot) -> None:
        """See that an encoder knows every token that its tokenizer may give."""
        highest = self.tokenizer_files(slot.tokenizer).highest
        known = self._vocabulary(slot.name)
        if highest >= known:
            raise TensorMismatchError(
                f"the {slot.tokenizer} is of another model than the {slot.name}",
                seen=f"{self.checkpoint.component(slot.tokenizer).folder}: "
                f"token ids up to {highest}",
                allowed=f"token ids up to {known - 1}, the vocabulary of the {slot.name}",
                hint=f"name the right one: --component {slot.tokenizer}=PLACE",
            )

    def _check_schedule(self) -> None:
        """Make a schedule of one step, to see that its config describes one."""
        try:
            self.schedule(1, tokens=1, device=torch.device("cpu"))
        except CheckpointError:
            raise
        except Exception as error:  # the libraries raise whatever their arithmetic raises
            (name,) = self.role("schedule")
            raise CheckpointDamagedError(
                f"the config of {name} describes no schedule",
                seen=f"{self.checkpoint.component(name).folder}: {str(error)[:200]}",
            ) from error

    # --- networks --------------------------------------------------------------------------------

    def outline(self, component: str) -> Outline:
        """Return a network without weights, compared with its files when it is first used."""
        if component not in self._outlines:
            self._outlines[component] = Outline(
                self.kind(component),
                self.checkpoint.component(component),
                self.config_of(component),
                lambda module: self.trim(component, module),
            )
        return self._outlines[component]

    def library_config(self, component: str) -> Any:
        """Return a network's own config, the library's defaults filled in."""
        return self.outline(component).config

    def matched(self, component: str) -> tuple[torch.nn.Module, Mapping[str, Piece]]:
        """Return a network without weights, and where each of its tensors comes from."""
        return self.outline(component).matched()

    def dtypes(self, dtype: str) -> dict[str, tuple[str, str]]:
        """Return dtype and reason of each component when the model computes in `dtype`."""
        found = {}
        for name in self.networks:
            kind = self.kind(name)
            low = dtype == "float16"
            wide = low and kind.overflow
            reason = (kind.overflow or kind.wide_tensors) if low else ""
            found[name] = ("float32" if wide else dtype, reason)
        return found

    def elements(self, component: str) -> int:
        """Return how many numbers of a component's weights are read; tied ones count once."""
        return self.outline(component).elements

    def table_elements(self, component: str) -> int:
        """Return how many of them are tables, of which a run looks up a few rows."""
        return self.outline(component).table_elements

    def units(self, component: str) -> list[tuple[Unit, int]]:
        """Return what can be streamed of a component, with the bytes of each on disk."""
        return self.outline(component).units

    def build(
        self,
        component: str,
        *,
        dtype: str,
        device: torch.device,
        on_bytes: OnBytes,
        streaming: Streaming | None = None,
    ) -> torch.nn.Module:
        """Read a component's weights and return it ready to compute.

        Args:
            component: one of those named in `stages`.
            dtype: what it computes in.
            device: where it is put.
            on_bytes: called with the number of bytes read so far.
            streaming: if given, its blocks are read when they are needed, but for those that stay.
        """
        if self._slot[component].tokenizer:
            with LAZY_IMPORTS:
                self.tokenizer(component)  # its faults are reported before weights are read
        return self.outline(component).build(getattr(torch, dtype), device, on_bytes, streaming)

    # --- schedule and text -----------------------------------------------------------------------

    def schedule(self, steps: int, *, tokens: int, device: torch.device) -> Any:
        """Return a scheduler ready for a run.

        Args:
            steps: of the run.
            tokens: patches of latents of an image, by which a schedule may be shifted.
            device: where its tables are put.
        """
        scheduler = flow.euler(self.schedule_config)
        extra: dict[str, Any] = {"num_inference_steps": steps}
        if (sigmas := self.sigmas(steps)) is not None:
            extra = {"sigmas": sigmas}
        if scheduler.config.use_dynamic_shifting:
            extra["mu"] = self.shift(scheduler.config, tokens)
        scheduler.set_timesteps(device=device, **extra)
        scheduler.set_begin_index(0)
        return scheduler

    def tokenizer_files(self, name: str) -> tokenizers.TokenizerFiles:
        """Return a tokenizer's files, read and checked once."""
        if name not in self._files:
            folder = self.checkpoint.component(name).folder
            kind = tokenizers.KINDS[self._slot[name].kind]
            self._files[name] = tokenizers.read_tokenizer(kind, folder, name)
        return self._files[name]

    def tokenizer(self, encoder: str) -> Any:
        """Return the tokenizer that belongs to a text encoder, opened once."""
        name = self._slot[encoder].tokenizer
        if name not in self._tokenizers:
            kind = tokenizers.KINDS[self._slot[name].kind]
            self._tokenizers[name] = tokenizers.open_tokenizer(kind, self.tokenizer_files(name))
        return self._tokenizers[name]

    def tokenize(self, encoder: str, text: str, length: int) -> torch.Tensor:
        """Return the tokens of a text, padded and cut to a length.

        Returns:
            (1, length), int64, on the CPU.

        Raises:
            TensorMismatchError: the encoder does not know one of them.
        """
        encoded = tokenizers.encode(
            self.tokenizer(encoder),
            [text],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        self.check_ids(encoder, encoded.input_ids)
        ids: torch.Tensor = encoded.input_ids
        return ids

    def check_ids(self, encoder: str, ids: torch.Tensor) -> None:
        """See that an encoder knows every token its tokenizer gave.

        Raises:
            TensorMismatchError: it does not; they are of different models.
        """
        if int(ids.max()) >= self._vocabulary(encoder):
            raise TensorMismatchError(
                f"the tokenizer of {encoder} is of another model",
                seen=f"token {int(ids.max())}",
                allowed=f"{self._vocabulary(encoder)} tokens in the encoder's vocabulary",
            )

    def _vocabulary(self, encoder: str) -> int:
        return self.kind(encoder).vocabulary(self.library_config(encoder))
