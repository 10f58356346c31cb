"""Training is repeatable, and an interruption changes nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from training.loop import Randomness, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def stage(folder: Path, steps: int) -> Stage:
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Linear(6, 12), torch.nn.GELU(), torch.nn.Linear(12, 2)
        )
    matrix, *others = sorted(module.parameters(), key=lambda parameter: -parameter.numel())
    optimizers = (torch.optim.Muon([matrix], lr=0.02), torch.optim.AdamW(others, lr=0.01))
    return Stage(
        name="toy",
        folder=folder,
        steps=steps,
        seed=3,
        module=module,
        optimizers=optimizers,
        warm_up=5,
    )


def train(one: Stage, *, stop_at: int | None = None) -> None:
    def losses(randomness: Randomness) -> Mapping[str, torch.Tensor]:
        if randomness.step == stop_at:
            one.save()
            raise KeyboardInterrupt
        x = torch.randn(16, 6, generator=randomness.torch)
        error = one.module(x) - x[:, :2] * x[:, 2:4]
        return {"loss": error.square().mean()}

    one.run(losses)


def curve(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "toy.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def test_the_same_seed_gives_the_same_curve_and_weights(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        one = stage(tmp_path / name, 100)
        train(one)
        found.append((curve(tmp_path / name), one.averaged_state()))
    assert found[0][0] == found[1][0]
    assert found[0][0][-1][0] == 100
    assert all(torch.equal(found[0][1][name], tensor) for name, tensor in found[1][1].items())


def test_an_interruption_changes_nothing(tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = stage(tmp_path / "whole", 100)
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(stage(tmp_path / "broken", 100), stop_at=60)
    resumed = stage(tmp_path / "broken", 100)
    assert resumed.done == 60
    train(resumed)
    for name, tensor in whole.averaged_state().items():
        assert torch.equal(resumed.averaged_state()[name], tensor), name
    assert curve(tmp_path / "whole") == curve(tmp_path / "broken")


def test_it_learns(tmp_path: Path) -> None:
    one = stage(tmp_path, 400)
    train(one)
    losses = [loss for _, loss in curve(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]
