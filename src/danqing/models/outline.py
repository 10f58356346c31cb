"""A network's outline: made without weights, and compared with the files that hold them."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from danqing.errors import CheckpointDamagedError, CheckpointError, TensorMismatchError
from danqing.networks.loading import SHOWN, Piece, fill, match, on_meta, shapes_of
from danqing.networks.units import Source, Unit, spans_of, units_of
from danqing.weights.ranges import lay_out

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from danqing.models.kinds.base import NetworkKind
    from danqing.networks.streaming import Streaming
    from danqing.weights import Component


class Outline:
    """One component's network on the meta device; made when first needed.

    Attributes:
        kind: of the network.
        part: the component on disk.
    """

    def __init__(
        self,
        kind: NetworkKind,
        part: Component,
        values: Mapping[str, Any],
        trim: Callable[[torch.nn.Module], torch.nn.Module],
    ) -> None:
        """Keep what the network is made from.

        Args:
            kind: of the network.
            part: the component on disk.
            values: of its config, checked.
            trim: drops the layers that this model never computes; they are not read.
        """
        self.kind = kind
        self.part = part
        self._values = values
        self._trim = trim
        self._module: torch.nn.Module | None = None
        self._pieces: dict[str, Piece] = {}

    def matched(self) -> tuple[torch.nn.Module, dict[str, Piece]]:
        """Return a new network, untrimmed, and where each of its tensors comes from.

        Raises:
            CheckpointError: the config describes no network, or the tensors are not its.
        """
        self._compare_counts()
        try:
            module: torch.nn.Module = on_meta(partial(self.kind.make, self._values))
        except Exception as error:  # the libraries raise whatever their configs' checks raise
            raise CheckpointDamagedError(
                f"the config of {self.part.name} describes no network",
                seen=f"{self.part.folder}: {str(error)[:200]}",
            ) from error
        shapes = shapes_of(module)
        rows = self.kind.rows(self.part, self._values, shapes)
        return module, match(self.part, shapes, rows, ignored=self.kind.ignored)

    def build(
        self,
        dtype: torch.dtype,
        device: torch.device,
        on_bytes: Callable[[int], None],
        streaming: Streaming | None,
    ) -> torch.nn.Module:
        """Read the weights and return the network ready to compute; the outline is made again.

        Args:
            dtype: what it computes in.
            device: where it is put.
            on_bytes: called with the number of bytes read so far.
            streaming: if given, its blocks are read when they are needed, but for those that stay.
        """
        staying = streaming.staying.get(self.part.name) if streaming else None
        units = [u for u, _ in self.units if staying is not None and u.name not in staying]
        module, self._module = self.module, None
        kept = shapes_of(module)
        pieces = {name: piece for name, piece in self._pieces.items() if name in kept}

        def dtype_of(name: str) -> torch.dtype:
            return self.kind.tensor_dtype(name, dtype)

        fill(
            module,
            self.part,
            pieces,
            dtype_of=dtype_of,
            device=device,
            on_bytes=on_bytes,
            streamed={name for unit in units for name in unit.tensors},
            read=streaming.read if streaming else None,
            looked_up=_tables(module),
        )
        self.kind.finish(module, device, dtype)
        if streaming is not None and units:
            source = Source(self.part, pieces, dtype_of, streaming.device)
            streaming.attach(self.part.name, module, source, units)
        return module

    @property
    def module(self) -> torch.nn.Module:
        """The network without weights and without the layers that are never computed."""
        if self._module is None:
            module, self._pieces = self.matched()
            self._module = self._trim(module)
        return self._module

    @cached_property
    def config(self) -> Any:
        """The network's own config, the library's defaults filled in."""
        return self.module.config

    @property
    def elements(self) -> int:
        """Number of parameters read from disk; tied weights count once."""
        state = self.module.state_dict()
        return sum({self._pieces[name]: t.numel() for name, t in state.items()}.values())

    @property
    def table_elements(self) -> int:
        """Number of them in embedding tables, of which a run looks up a few rows."""
        state = self.module.state_dict()
        names = _tables(self.module)
        return sum({self._pieces[name]: state[name].numel() for name in names}.values())

    @property
    def block_elements(self) -> int:
        """Number of parameters in the blocks that every step computes."""
        return sum(unit.elements for unit, _ in self.units if not unit.once)

    @cached_property
    def units(self) -> list[tuple[Unit, int]]:
        """What can be streamed, and the bytes of each on disk."""
        found = []
        for unit in units_of(self.module, self.kind.once(self.module)):
            spans = spans_of(self.part, [self._pieces[name] for name in unit.tensors])
            if spans is not None:
                found.append((unit, lay_out(spans).size))
        return found

    def _compare_counts(self) -> None:
        """Compare layers with the tensors before a network is built: each takes time and memory."""
        try:
            counts = self.kind.counts(self.part, self._values)
        except CheckpointError:
            return  # tensors are missing: `match` lists them, and the tables bound the network
        wrong = []
        for key, count in counts.items():
            value: Any = self._values
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            stated = list(value) if isinstance(value, (list, tuple)) else value
            if value is not None and stated != count:
                wrong.append(f"{key} is {str(stated)[:100]}, of the tensors {str(count)[:100]}")
        if wrong:
            raise TensorMismatchError(
                f"the tensors of {self.part.name} are not those of its config",
                seen=f"{self.part.folder}: {'; '.join(wrong[:SHOWN])}",
                hint="config and files are of different models, or one of them is damaged",
            )


def _tables(module: torch.nn.Module) -> set[str]:
    """Return the paths of embedding tables."""
    return {
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Embedding)
    }
