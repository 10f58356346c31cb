"""What depends on the step alone, computed once for all steps.

The layers that modulate a transformer's blocks (adaLN, https://arxiv.org/abs/2212.09748) see the
timestep and the pooled prompt, never the picture. In FLUX.1 they hold 3.2 of 11.9 billion
parameters. Run for all steps together, each is read once for a request and not once for every step,
and need not be in memory during the loop at all. Where blocks are streamed, those of a block run
before it does for the first time, so that reading them hides behind the arithmetic. Each is called
as in the loop, with one step's input at a time, so the numbers are the same bit for bit.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from danqing.networks.of_torch import is_watched
from danqing.networks.streaming import streamed_part
from danqing.networks.units import block_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.utils.hooks import RemovableHandle


@dataclass
class Hoisted:
    """What the layers gave for the last request; small, and it outlives the network.

    Attributes:
        embedded: of each step, what the layers saw.
        values: of each layer and step, what it gave.
    """

    embedded: torch.Tensor | None = None
    values: list[list[torch.Tensor]] = field(default_factory=list)


class _Stored(nn.Module):
    """Stands in a layer's place and gives what the layer gave for this step."""

    def __init__(self, values: Sequence[torch.Tensor], now: torch.Tensor) -> None:
        """Take what the layer gave at each step, and the memory that it is given out in."""
        super().__init__()
        self.values = values
        self.now = now

    def at(self, step: int) -> None:
        """Give what belongs to a step, counted from 0; in memory that stays where it is."""
        self.now.copy_(self.values[step])

    def forward(self, first: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        if len(first) != len(self.now):
            msg = f"computed beforehand for {len(self.now)} rows, not {len(first)}"
            raise RuntimeError(msg)
        return self.now


@contextlib.contextmanager
def hoisted(
    transformer: nn.Module,
    embed: Callable[[int], torch.Tensor],
    *,
    embedder: str,
    layers: Sequence[str],
    steps: int,
    kept: Hoisted,
) -> Iterator[Callable[[int], None]]:
    """Run the layers that see only the step; as long as this lasts, they give what they gave.

    Args:
        transformer: with the layers.
        embed: calls the embedder for a step, counted from 0.
        embedder: path of what embeds timestep and pooled prompt.
        layers: paths of the layers that see a SiLU of this embedding and nothing else.
        steps: of the run.
        kept: what they gave the last time, which is taken if they would see the same again.

    Yields:
        What is to be called with the number of each step before it, counted from 0.
    """
    # The timesteps are known before the first step, so every input of these layers is, too. Each
    # is exchanged for a table of its outputs, one row a step. All tables are allocated at once and
    # before the loop: small tensors that last, made between large ones, fragment memory. The layers
    # are put back even if one fails or cannot be read; else the next request would take its values
    # from this one's table.
    embedded = [embed(step) for step in range(steps)]
    known = _knows(kept, transformer, layers, embedded)
    originals = [transformer.get_submodule(name) for name in layers]
    room = _room(originals, embedded, times=1 if known else 1 + steps)
    if not known:
        kept.embedded, kept.values = None, [values for _, *values in room]
    stand_ins = [_Stored(values, now) for values, (now, *_) in zip(kept.values, room, strict=True)]
    stand_ins.append(_Stored(embedded, embedded[0].clone()))
    streamed = streamed_part(transformer)
    if streamed is not None:
        streamed.expect(steps, once=not known)

    def at(step: int) -> None:
        for one in stand_ins:
            one.at(step)

    with contextlib.ExitStack() as undo:  # also if a layer fails, or what it is read from
        for name, one in zip([*layers, embedder], stand_ins, strict=True):
            undo.callback(_exchange, transformer, name, _exchange(transformer, name, one))
        if not known:
            work = _Work(originals, stand_ins, embedded, kept)
            for watch in _distribute(transformer, layers, work.run, by_block=streamed is not None):
                undo.callback(watch.remove)
        yield at


def _room(
    layers: Sequence[Any], embedded: Sequence[torch.Tensor], times: int
) -> list[list[torch.Tensor]]:
    """Return memory for what each layer gives, so many times: for now, and for each step.

    In one piece: made by and by, between the steps' own tensors, these small ones that last would
    tear the memory of the large ones to pieces.
    """
    rows = len(embedded[0])
    sizes = [rows * layer.out_features for layer in layers for _ in range(times)]
    parts = iter(torch.split(embedded[0].new_empty(sum(sizes)), sizes))
    return [[next(parts).view(rows, layer.out_features) for _ in range(times)] for layer in layers]


@dataclass
class _Work:
    """The layers, and where what they give goes."""

    layers: Sequence[nn.Module]
    stand_ins: Sequence[_Stored]
    embedded: Sequence[torch.Tensor]
    kept: Hoisted
    done: set[int] = field(default_factory=set)

    def run(self, chosen: Sequence[int]) -> None:
        """Compute some of the layers for all steps; after the last, they can be taken again."""
        for number in chosen:
            for value, one in zip(self.kept.values[number], self.embedded, strict=True):
                value.copy_(self.layers[number](nn.functional.silu(one)))
            self.stand_ins[number].at(0)
        self.done.update(chosen)
        if len(self.done) == len(self.layers):
            self.kept.embedded = torch.stack([*self.embedded])


def _distribute(
    transformer: nn.Module,
    layers: Sequence[str],
    run: Callable[[Sequence[int]], None],
    *,
    by_block: bool,
) -> list[RemovableHandle]:
    """Run all layers now, or those of each block before it; return what is to be taken back."""
    numbers: dict[str, list[int]] = {"": []}
    for number, name in enumerate(layers):
        block = block_of(transformer, name) if by_block else ""
        numbers.setdefault(block, []).append(number)
    run(numbers.pop(""))
    return [
        _before_first(transformer.get_submodule(block), partial(run, chosen))
        for block, chosen in numbers.items()
    ]


def _before_first(block: nn.Module, run: Callable[[], None]) -> RemovableHandle:
    """Run something before a block is computed for the first time, and before it is read."""

    def hook(*_: Any) -> None:
        watch.remove()
        run()

    watch = block.register_forward_pre_hook(hook, prepend=True)
    return watch


def _knows(
    kept: Hoisted, transformer: nn.Module, layers: Sequence[str], embedded: Sequence[torch.Tensor]
) -> bool:
    """Say whether the same was computed before, and nobody watches the layers now."""
    if any(is_watched(transformer.get_submodule(name)) for name in layers):
        return False
    now, before = torch.stack([*embedded]), kept.embedded
    return before is not None and before.shape == now.shape and torch.equal(before, now)


def _exchange(transformer: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    owner, _, leaf = name.rpartition(".")
    parent = transformer.get_submodule(owner)
    before = getattr(parent, leaf)
    setattr(parent, leaf, layer)
    return before  # type: ignore[no-any-return]
