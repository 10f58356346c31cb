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
