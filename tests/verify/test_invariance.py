"""Switches of memory and speed: judged like devices."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

import danqing
from danqing.cli import app
from danqing.errors import KernelError, RequestError
from danqing.verify.invariance import check_invariance
from danqing.verify.parity import prepare
from tests import faults

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}


def opened(place: object = "pocket", **options: Any) -> Callable[[], danqing.Engine]:
    return lambda: danqing.open(str(place), device="cpu", **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_switches_there_are(deepgen: Path, tmp_path: Path, dtype: str) -> None:
    for place in ("pocket", deepgen):
        with opened(place)() as engine:
            request = engine.spec.resolve(danqing.Request(prompt="a boat", **SMALL))
        exact, base = opened(place, dtype="float32"), opened(place, dtype=dtype)
        baseline = prepare(exact, base, request=request, folder=tmp_path)
        switches = {
            "staged": opened(place, dtype=dtype, placement="staged"),
            "math": opened(place, dtype=dtype, attention="math"),
            "deterministic": opened(place, dtype=dtype, deterministic=True),
            "efficient": opened(place, dtype=dtype, attention="efficient"),
        }
        found = {one.name: one for one in check_invariance(baseline, switches)}
        assert found["staged"].rung == "identical"
        assert found["deterministic"].rung == "identical"
        assert found["math"].rung in {"identical", "close"}
        assert found["efficient"].rung is None
        assert "no efficient attention" in found["efficient"].note
        assert found["conditioning reused"].rung == "identical"
        assert found["batch of 2"].rung in {"identical", "alike"}


@pytest.mark.parametrize(
    ("what", "rung"),
    [
        ("a block skipped", "different"),
        pytest.param("exact GELU for the tanh one", "alike", marks=pytest.mark.slow),
    ],
)
def test_a_switch_that_changes_the_numbers_fails(what: str, rung: str, tmp_path: Path) -> None:
    """Also if the image stays alike and only a step is beyond its limit."""
    fault = next(one for one in faults.POCKET if one.what == what)
    base = opened(dtype="float32")
    with base() as engine:
        request = engine.spec.resolve(danqing.Request(prompt="a boat", **SMALL))
    baseline = prepare(base, base, request=request, folder=tmp_path)
    (found, *_) = check_invariance(baseline, {"faulty": lambda: faults.plant(base(), fault)})
    assert found.rung == rung
    assert not found.passed
    assert found.note.startswith("first at denoise/")


def test_math_really_runs_other_kernels() -> None:
    """Under it torch runs matrix products where its flash attention was."""
    from torch.profiler import profile

    names: dict[str, set[str]] = {}
    for kernel in ("auto", "math"):
        with opened(dtype="float32", attention=kernel)() as engine:
            engine.load()
            with profile() as seen:
                engine.generate("a boat", **SMALL)
        names[kernel] = {event.key for event in seen.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names["auto"]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" not in names["math"]
    assert "aten::_scaled_dot_product_attention_math" in names["math"]


def test_what_is_no_attention_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown attention kernel") as caught:
        opened(attention="flash2")()
    assert "math" in str(caught.value)
    with pytest.raises(KernelError, match="cpu has no cudnn attention") as missing:
        opened(attention="cudnn")()
    assert missing.value.exit_code == 4


def test_deterministic_kernels_are_asked_for_and_put_back() -> None:
    seen: list[bool] = []

    def look(*_: object) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())

    with opened(dtype="float32", deterministic=True)() as engine:
        picture = engine.probe(danqing.Request(prompt="a boat", **SMALL), look)
    assert any(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    assert picture.provenance.device["deterministic"] is True


def test_the_command() -> None:
    arguments = [
        "verify",
        "invariance",
        "a boat",
        "--json",
        "-q",
        "--height",
        "64",
        "--width",
        "64",
    ]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    rows = {row["name"]: row["rung"] for row in json.loads(ran.stdout)}
    assert rows["--placement staged"] == "identical"
    assert rows["--attention cudnn"] is None
    assert "--deterministic" in rows
