"""The whole training at a hundredth of its length, twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import danqing

ROOT = Path(__file__).parents[2]


def short_run(folder: Path) -> dict[str, list[dict[str, float]]]:
    subprocess.run(
        [sys.executable, "-m", "training", "--share", "0.01", "--folder", str(folder)],
        cwd=ROOT,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    logs = {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        logs[path.stem] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return logs


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_same_seed_gives_the_same_losses(tmp_path: Path) -> None:
    first, second = short_run(tmp_path / "first"), short_run(tmp_path / "second")
    assert set(first) == {"text", "autoencoder", "flow", "straight"}
    assert first == second
    assert first["flow"][-1]["loss"] < first["flow"][0]["loss"]
    with danqing.open(tmp_path / "first" / "checkpoint", device="cpu") as engine:
        assert engine.generate("a red circle", seed=1).image.size == (128, 128)
