"""The OpenAPI document is true: schemathesis makes requests of it, right and wrong ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from danqing.serve.openapi import _whole_numbers
from tests.serve.conftest import serving

pytestmark = pytest.mark.enable_socket


@pytest.mark.parametrize("most", [64, 100, 768, 999, 1000, 1024, 2048, 16384])
def test_the_pattern_of_a_side(most: int) -> None:
    pattern = re.compile(_whole_numbers(most))
    found = [number for number in range(most + 1200) if pattern.fullmatch(str(number))]
    assert found == list(range(8, most + 1))


@pytest.mark.parametrize(
    ("examples", "phases"),
    [
        (5, "examples,fuzzing"),
        pytest.param(
            100, "examples,coverage,fuzzing,stateful",
            marks=[pytest.mark.slow, pytest.mark.timeout(1200)],
        ),
    ],
)  # fmt: skip
def test_schemathesis_finds_nothing(examples: int, phases: str, tmp_path: Path) -> None:
    flags = ["--max-side", "128", "--max-steps", "4", "--per-client", "64", "--device", "cpu"]
    with serving("--no-page", *flags) as server:
        found = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"), "run",
                f"{server.address}/openapi.json", "--checks", "all", "--seed", "1",
                "--max-examples", str(examples), "--workers", "2", "--no-color",
                "--phases", phases,
            ],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert found.returncode == 0, found.stdout[-6000:]
        assert "9 selected / 9 total" in found.stdout
