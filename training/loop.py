"""What every stage of the training shares: a schedule, averaged weights, a log, and resuming.

A step's randomness comes from the seed and the step's number alone, so a stage that was interrupted
goes on exactly as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

SAVE_EVERY_SECONDS = 120.0


@dataclass(kw_only=True)
class Stage:
    """One stage of the training.

    Attributes:
        name: of its files: `NAME.safetensors` (the state) and `NAME.jsonl` (the log).
        folder: where they are.
        steps: how many it takes.
        seed: of everything random in it.
        module: what is trained.
        optimizers: with the learning rates at their peaks.
        average: share of the averaged weights that is kept at each step, in the end.
        warm_up: steps until the peak of the learning rate.
        cooled: share of the peak that is left at the end of the cosine.
    """

    name: str
    folder: Path
    steps: int
    seed: int
    module: torch.nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    average: float = 0.999
    warm_up: int = 100
    cooled: float = 0.0
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Read the state, if there is one."""
        self.averaged = {
            name: tensor.detach().clone().float() for name, tensor in self.module.named_parameters()
        }
        self._peaks = [[group["lr"] for group in one.param_groups] for one in self.optimizers]
        if self._state.exists():
            self._restore()

    def run(
        self,
        loss_of: Callable[[Randomness], Mapping[str, torch.Tensor]],
        *,
        every: int = 0,
        show: Callable[[int], None] | None = None,
    ) -> None:
        """Take the steps that are left; `loss_of` returns losses, the one named `loss` is followed.

        Args:
            loss_of: computes the losses of one step.
            every: steps between two calls of `show`.
            show: is called with the number of steps done.
        """
        saved, started = time.monotonic(), time.monotonic()
        sums: dict[str, float] = {}
        taken = 0
        while self.done < self.steps:
            self._set_rates()
            losses = loss_of(Randomness(self.seed, self.done))
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.done += 1
            self._blend()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            taken += 1
            if self.done % 20 == 0 or self.done == self.steps:
                self._log({name: value / taken for name, value in sums.items()}, started)
                sums, taken = {}, 0
            if every and show and self.done % every == 0:
                show(self.done)
            if time.monotonic() - saved > SAVE_EVERY_SECONDS or self.done == self.steps:
                self.save()
                saved = time.monotonic()

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights."""
        return {**self.module.state_dict(), **self.averaged}

    def save(self) -> None:
        """Write the state, all of it or nothing."""
        tensors = {f"module.{name}": t for name, t in self.module.state_dict().items()}
        tensors |= {f"averaged.{name}": t for name, t in self.averaged.items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer.{number}.{index}.{name}"] = torch.as_tensor(value)
        unfinished = self._state.with_suffix(".part")
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(copies, unfinished, metadata={"done": str(self.done)})
        unfinished.rename(self._state)

    def _restore(self) -> None:
        from safetensors import safe_open

        tensors = load_file(self._state)
        with safe_open(self._state, "pt") as file:
            self.done = int(file.metadata()["done"])
        self.module.load_state_dict(_under("module.", tensors))
        self.averaged = _under("averaged.", tensors)
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in _under(f"optimizer.{number}.", tensors).items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        lines = self._log_file.read_text("utf-8").splitlines() if self._log_file.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.done]
        self._log_file.write_text("".join(f"{line}\n" for line in kept), "utf-8")

    def _set_rates(self) -> None:
        warm = min(1.0, (self.done + 1) / self.warm_up)
        progress = self.done / max(self.steps, 1)
        cool = self.cooled + (1 - self.cooled) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * warm * cool

    @torch.no_grad()
    def _blend(self) -> None:
        keep = min(self.average, (1 + self.done) / (10 + self.done))
        for name, parameter in self.module.named_parameters():
            self.averaged[name].lerp_(parameter.float(), 1 - keep)

    def _log(self, means: Mapping[str, float], started: float) -> None:
        row: dict[str, Any] = {"step": self.done, **{k: round(v, 6) for k, v in means.items()}}
        row["seconds"] = round(time.monotonic() - started, 1)
        with self._log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def _state(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def _log_file(self) -> Path:
        return self.folder / f"{self.name}.jsonl"


class Randomness:
    """The random numbers of one step."""

    def __init__(self, seed: int, step: int) -> None:
        """Derive both generators from the seed and the step's number."""
        self.step = step
        self.numpy = np.random.default_rng([seed, step])
        self.torch = torch.Generator().manual_seed(int(self.numpy.integers(2**62)))


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
