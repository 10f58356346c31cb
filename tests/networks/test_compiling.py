"""What compiling takes is told apart from the arithmetic, and its results are kept."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import danqing
from danqing.cache import keep_compiled
from danqing.networks.compiling import clocked

if TYPE_CHECKING:
    from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def test_the_clock_counts_compiling_alone() -> None:
    doubled = torch.compile(lambda x: x * 2, backend="eager")
    with clocked() as clock:
        doubled(torch.ones(3))
        first = clock.seconds
        doubled(torch.ones(3))
        assert clock.seconds == first > 0
    torch.compile(lambda x: x * 3, backend="eager")(torch.ones(3))
    assert clock.seconds == first


def test_a_compiled_picture_tells_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With torch's own do-nothing compiler, which takes no C++."""
    from danqing.devices.cpu import Cpu

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(Cpu, "compiler", lambda *_: "eager")
    found = {}
    for name in ("off", "inductor"):
        with danqing.open("pocket", device="cpu", compile_with=name) as engine:
            found[name] = engine.generate("a boat", seed=1).pictures[0]
    spent = {name: sum(c.compile_seconds for c in one.stages) for name, one in found.items()}
    assert spent["off"] == 0 < spent["inductor"]
    (denoise,) = (cost for cost in found["inductor"].stages if cost.name == "denoise")
    assert denoise.compile_seconds == spent["inductor"] < denoise.seconds


@pytest.mark.parametrize("model", ["schnell", "deepgen"])
def test_every_family_compiles(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of the transformer, and nothing else; the do-nothing compiler keeps the bits."""
    from danqing.devices.cpu import Cpu
    from danqing.networks.streaming import blocks_of

    monkeypatch.setattr(Cpu, "compiler", lambda *_: "eager")
    settings: dict[str, Any] = {"seed": 1, "height": 64, "width": 64, "num_inference_steps": 2}
    folder, found = request.getfixturevalue(model), []
    for name in ("off", "inductor"):
        with danqing.open(folder, device="cpu", compile_with=name, placement="resident") as engine:
            found.append(engine.generate("a boat", **settings).image.tobytes())
            transformer = engine._modules["transformer"]
            compiled = [
                block._compiled_call_impl is not None for _, block in blocks_of(transformer)
            ]
            assert compiled == [name != "off"] * len(compiled) != []
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_compiles_deepgen(deepgen: Path) -> None:
    settings: dict[str, Any] = {"seed": 1, "height": 64, "width": 64, "num_inference_steps": 2}
    found = []
    for name in ("off", "inductor"):
        with danqing.open(deepgen, device="cpu", compile_with=name) as engine:
            image = engine.generate("a boat", **settings).image
            found.append(np.asarray(image, dtype=int))
    assert np.abs(found[0] - found[1]).max() <= 2


def test_compiled_code_is_kept_with_all_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "/tmp/torch_s_own")  # it sets this itself when it is imported
    keep_compiled("/tmp/torch_s_own")
    assert os.environ[VARIABLE] == str(tmp_path / "danqing" / "compiled")
    keep_compiled("/tmp/torch_s_own")
    assert os.environ[VARIABLE] == str(tmp_path / "danqing" / "compiled")
    monkeypatch.setenv(VARIABLE, "/somewhere/else")
    keep_compiled("/tmp/torch_s_own")
    assert os.environ[VARIABLE] == "/somewhere/else"
