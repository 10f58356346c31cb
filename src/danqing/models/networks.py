"""A model made of networks of libraries, each with a config, a key map and files: what is shared.

A family says how each network is made and which tensors of the files are which of its own; all
checking and reading follows from that.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from danqing.errors import CheckpointDamagedError, CheckpointError, TensorMismatchError
from danqing.models.base import Model
from danqing.models.tokenizers import TokenizerFiles, TokenizerKind, read_tokenizer
from danqing.networks.hoisting import Hoisted
from danqing.networks.loading import SHOWN, Piece, Row, fill, match, on_meta, shapes_of
from danqing.networks.streaming import Source, Streaming, Unit, spans_of, units_of
from danqing.turns import LAZY_IMPORTS
from danqing.weights.ranges import lay_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from danqing.models.base import ModelSpec, OnBytes
    from danqing.models.config_tables import Config
    from danqing.weights import Checkpoint


_LARGE_CHANNELS = 128


@dataclass(frozen=True)
class Network:
    """How to make one of the networks from its config, its key map, and tensors without use."""

    make: Callable[[Mapping[str, Any]], Any]
    rows: Callable[[Mapping[str, Any]], Iterable[Row]]
    ignored: Callable[[str], bool] = lambda _: False


class NetworksModel(Model):
    """A model whose components are networks and their small files.

    Attributes:
        tokenizer_kinds: of each tokenizer, what danqing knows of its kind.
    """

    tokenizer_kinds: ClassVar[Mapping[str, TokenizerKind]]

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        """Keep what is needed to make the networks."""
        super().__init__(checkpoint, spec)
        self._pieces: dict[str, dict[str, Piece]] = {}
        self._checked: dict[str, torch.nn.Module] = {}
        self._cut: set[str] = set()
        self._hoisted = Hoisted()
        self._configs: dict[str, Config] = {}
        self._tokenizers: dict[str, TokenizerFiles] = {}

    @property
    @abstractmethod
    def networks(self) -> Mapping[str, Network]:
        """Return how to make each network, by component."""

    @abstractmethod
    def read_config(self, component: str) -> Config:
        """Return a config: the one that came with it, checked, or what its shapes tell."""

    @abstractmethod
    def counts(self, component: str) -> Mapping[str, Any]:
        """Return how many layers a network's tensors are of, by the config's key for it.

        `a.b` is the key `b` in the table `a`.

        Raises:
            CheckpointError: tensors that would tell are missing.
        """

    def config(self, component: str) -> Config:
        """Return a component's config, read once."""
        if component not in self._configs:
            self._configs[component] = self.read_config(component)
        return self._configs[component]

    def config_of(self, component: str) -> Mapping[str, Any]:
        """Return the values of a network's config."""
        return self.config(component).values

    def notes_of(self, component: str) -> tuple[str, ...]:
        """Return what was ignored in a component's small files."""
        if component in self.tokenizer_kinds:
            return self.tokenizer_files(component).notes
        return self.config(component).notes

    def tensor_dtype(self, component: str, name: str, dtype: torch.dtype) -> torch.dtype:  # noqa: ARG002
        """Return what one tensor is kept in when its network computes in `dtype`."""
        return dtype

    def trimmed(self, component: str, module: torch.nn.Module) -> torch.nn.Module:  # noqa: ARG002
        """Return a network without the layers that are never computed; they are not read."""
        return module

    @abstractmethod
    def try_schedule(self) -> None:
        """Make a schedule, to see that its config describes one; the library's errors pass."""

    def check_part(self, name: str) -> None:
        """Compare a network with its files; of tokenizer and schedule, see that they are usable."""
        if name in self.tokenizer_kinds:
            self.tokenizer_files(name)
        elif name in self.role("schedule"):
            self._check_schedule()
        else:
            self.check_network(name)

    def _check_schedule(self) -> None:
        try:
            self.try_schedule()
        except CheckpointError:
            raise
        except Exception as error:  # the libraries raise whatever their arithmetic raises
            raise CheckpointDamagedError(
                "the config of scheduler describes no schedule",
                seen=f"{self.checkpoint.component('scheduler').folder}: {str(error)[:200]}",
            ) from error

    def tokenizer_files(self, name: str) -> TokenizerFiles:
        """Return a tokenizer's files, read and checked once."""
        if name not in self._tokenizers:
            folder = self.checkpoint.component(name).folder
            self._tokenizers[name] = read_tokenizer(self.tokenizer_kinds[name], folder, name)
        return self._tokenizers[name]

    def check_vocabulary(self, tokenizer: str, encoder: str, known: int) -> None:
        """See that an encoder knows every token that its tokenizer may give.

        Raises:
            TensorMismatchError: it does not; they are of different models.
        """
        highest = self.tokenizer_files(tokenizer).highest
        if highest >= known:
            raise TensorMismatchError(
                f"the {tokenizer} is of another model than the {encoder}",
                seen=f"{self.checkpoint.component(tokenizer).folder}: token ids up to {highest}",
                allowed=f"token ids up to {known - 1}, the vocabulary of the {encoder}",
                hint=f"name the right one: --component {tokenizer}=PLACE",
            )

    def check_network(self, component: str) -> None:
        """Compare a network with its files, and keep it for `build`."""
        self._checked[component] = self._empty(component)
        self._match(component, self._checked[component])

    def matched(self, component: str) -> tuple[torch.nn.Module, dict[str, Piece]]:
        """Return a network without weights, and where each of its tensors comes from."""
        module = self._empty(component)
        return module, self._match(component, module)

    def elements(self, component: str) -> int:
        """Return how many numbers of a network are read, each once however often it is used."""
        module, pieces = self._cut_network(component), self._pieces_of(component)
        return sum({pieces[n]: t.numel() for n, t in module.state_dict().items()}.values())

    def table_elements(self, component: str) -> int:
        """Return how many of them are tables, of which a run looks up a few rows."""
        module, pieces = self._cut_network(component), self._pieces_of(component)
        state = module.state_dict()
        return sum({pieces[n]: state[n].numel() for n in _tables(module)}.values())

    def block_elements(self, component: str) -> int:
        """Return how many numbers a network's blocks hold that are computed in every step."""
        return sum(unit.elements for unit, _ in self.units(component) if not unit.once)

    def once(self, component: str, module: torch.nn.Module) -> list[str]:  # noqa: ARG002
        """Return the layers of a network that are needed only in the first step."""
        return []

    def units(self, component: str) -> list[tuple[Unit, int]]:
        """Return what can be streamed of a network, and the bytes of each on disk."""
        module, pieces = self._cut_network(component), self._pieces_of(component)
        part = self.checkpoint.component(component)
        found = []
        for unit in units_of(module, self.once(component, module)):
            spans = spans_of(part, [pieces[name] for name in unit.tensors])
            if spans is not None:
                found.append((unit, lay_out(spans).size))
        return found

    def build(
        self,
        component: str,
        *,
        dtype: str,
        device: torch.device,
        on_bytes: OnBytes,
        streaming: Streaming | None = None,
    ) -> torch.nn.Module:
        """Read one network's weights, or all but those that are streamed."""
        with LAZY_IMPORTS:
            self.prepare(component)
        wanted: torch.dtype = getattr(torch, dtype)
        module = self._cut_network(component)
        units: list[Unit] = []
        read = None
        if streaming is not None:
            read = streaming.read
            if (staying := streaming.staying.get(component)) is not None:
                units = [unit for unit, _ in self.units(component) if unit.name not in staying]
        del self._checked[component]
        self._cut.discard(component)
        kept = shapes_of(module)
        part = self.checkpoint.component(component)
        pieces = {n: piece for n, piece in self._pieces_of(component).items() if n in kept}

        def dtype_of(name: str) -> torch.dtype:
            return self.tensor_dtype(component, name, wanted)

        fill(
            module,
            part,
            pieces,
            dtype_of=dtype_of,
            device=device,
            on_bytes=on_bytes,
            streamed={name for unit in units for name in unit.tensors},
            read=read,
            looked_up=_tables(module),
        )
        if component == "vae" and _likes_channels_last(module, device, wanted):
            module.apply(_channels_last)
        self.finish(component, module)
        if streaming is not None and units:
            source = Source(part, pieces, dtype_of, streaming.device)
            streaming.attach(component, module, source, units)
        return module

    def forget(self) -> None:
        """Let go of what the modulating layers gave."""
        self._hoisted = Hoisted()

    def prepare(self, component: str) -> None:
        """Open what a network needs beside its weights: what is wrong there is told before."""

    def finish(self, component: str, module: Any) -> None:
        """Change layers of a network whose weights are in their places."""

    def _pieces_of(self, component: str) -> dict[str, Piece]:
        return self._pieces.get(component) or self._match(component, self._empty(component))

    def _cut_network(self, component: str) -> torch.nn.Module:
        """Return a network without weights and without the layers that are never computed."""
        module = self._checked.get(component) or self._empty(component)
        if component not in self._cut:
            module = self.trimmed(component, module)
            self._cut.add(component)
        self._checked[component] = module
        return module

    def _empty(self, component: str) -> torch.nn.Module:
        make, config = self.networks[component].make, self.config_of(component)
        self._compare_counts(component, config)
        try:
            module: torch.nn.Module = on_meta(partial(make, config))
        except Exception as error:  # the libraries raise whatever their configs' checks raise
            raise CheckpointDamagedError(
                f"the config of {component} describes no network",
                seen=f"{self.checkpoint.component(component).folder}: {str(error)[:200]}",
            ) from error
        return module

    def _compare_counts(self, component: str, config: Mapping[str, Any]) -> None:
        """Compare layers with the tensors before a network is built: each takes time and memory."""
        try:
            counts = self.counts(component)
        except CheckpointError:
            return  # tensors are missing: `match` lists them, and the tables bound the network
        wrong = []
        for key, count in counts.items():
            value: Any = config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            stated = list(value) if isinstance(value, (list, tuple)) else value
            if value is not None and stated != count:
                wrong.append(f"{key} is {str(stated)[:100]}, of the tensors {str(count)[:100]}")
        if wrong:
            raise TensorMismatchError(
                f"the tensors of {component} are not those of its config",
                seen=f"{self.checkpoint.component(component).folder}: {'; '.join(wrong[:SHOWN])}",
                hint="config and files are of different models, or one of them is damaged",
            )

    def _match(self, component: str, module: torch.nn.Module) -> dict[str, Piece]:
        network = self.networks[component]
        shapes = shapes_of(module)
        part = self.checkpoint.component(component)
        rows = network.rows(shapes)
        self._pieces[component] = match(part, shapes, rows, ignored=network.ignored)
        return self._pieces[component]


def _tables(module: torch.nn.Module) -> set[str]:
    """Return the paths of embedding tables."""
    return {
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Embedding)
    }


def _channels_last(layer: torch.nn.Module) -> None:
    if isinstance(layer, torch.nn.Conv2d):
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def _likes_channels_last(module: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether its convolutions are faster so: in bfloat16 on a CPU, where they are large.

    Decoding 512x512 took 3.2 s against 3.9 s (decision 0014).
    """
    channels = module.config["block_out_channels"][0]
    return device.type == "cpu" and dtype is torch.bfloat16 and channels >= _LARGE_CHANNELS


# --- what it takes ------------------------------------------------------------------------------


def decode_flops(config: Mapping[str, Any], pixels: int) -> float:
    """Count the convolutions of diffusers' AutoencoderKL that turn latents into pixels."""
    widths = [int(width) for width in reversed(config["block_out_channels"])]
    layers = int(config["layers_per_block"]) + 1
    total, before = 0.0, widths[0]
    for level, width in enumerate(widths):
        here = pixels / 4 ** (len(widths) - 1 - level)
        total += here * 18 * (before * width + (2 * layers - 1) * width * width)
        if level < len(widths) - 1:
            total += 4 * here * 18 * width * width
        before = width
    return total


# --- transformers --------------------------------------------------------------------------------


def attention_of(network: Any) -> str:
    """Return the attention that a network of transformers is built with.

    It is said explicitly: left to the library, a config or the environment might choose it.
    """
    return "sdpa" if getattr(network, "_supports_sdpa", False) else "eager"


def check_ids(ids: torch.Tensor, vocabulary: int, name: str) -> None:
    """See that an encoder knows every token its tokenizer gave.

    Raises:
        TensorMismatchError: it does not; they are of different models.
    """
    if int(ids.max()) >= vocabulary:
        raise TensorMismatchError(
            f"the tokenizer of {name} is of another model",
            seen=f"token {int(ids.max())}",
            allowed=f"{vocabulary} tokens in the encoder's vocabulary",
        )
