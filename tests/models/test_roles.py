"""Roles: a denoiser of any name, and two of them, run in every placement."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

import danqing
from danqing import models
from danqing.request import Request
from danqing.verify.parity import check_parity
from tests import faults
from tests.models import two_denoisers_family, unet_family

if TYPE_CHECKING:
    from pathlib import Path

FAMILIES = {"unet": unet_family, "two denoisers": two_denoisers_family}
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "seed": 3}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = FAMILIES[request.param]
    monkeypatch.setitem(models.FAMILIES, request.param, found.__name__)
    return found


@pytest.fixture
def folder(family: Any, schnell: Path, tmp_path: Path) -> Path:
    """The toy FLUX.1, its denoiser under another name; two denoisers have the same weights."""
    folder = shutil.copytree(schnell, tmp_path / "renamed")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = family.PIPELINE
    shutil.move(folder / "transformer", folder / "unet")
    index["unet"] = index.pop("transformer")
    if family is two_denoisers_family:
        shutil.copytree(folder / "unet", folder / "unet_2")
        index["unet_2"] = index["unet"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def denoisers(engine: danqing.Engine) -> dict[str, Any]:
    return {p.name: p for p in engine.plan.components if p.name in engine.stages["denoise"]}


@pytest.mark.parametrize("placement", ["resident", "staged", "streamed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_image_is_that_of_the_family_with_usual_names(
    folder: Path, schnell: Path, placement: str, dtype: str
) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    with danqing.open(schnell, **options) as engine:
        expected = engine.generate("a cat", **SMALL).image.tobytes()
    with danqing.open(folder, placement=placement, **options) as engine:
        assert {part.placement for part in denoisers(engine).values()} == {placement}
        assert denoisers(engine).keys() == set(engine.stages["denoise"])
        for _ in range(2):
            assert engine.generate("a cat", **SMALL).image.tobytes() == expected


def test_what_each_image_needs_is_kept_if_it_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from danqing.devices.cpu import Cpu

    monkeypatch.setattr(Cpu, "base_bytes", lambda _: 0)  # of the process; it varies
    with danqing.open(folder, device="cpu", tile="off") as engine:
        peak = engine.plan.predicted_peak_bytes
    with danqing.open(folder, device="cpu", tile="off", memory=peak - 1) as engine:
        assert engine.plan.placement == "staged"
        assert {*engine.stages["denoise"], *engine.stages["decode"]} >= set(engine.plan.kept)
        assert engine.plan.kept[:1] == engine.stages["denoise"][:1]


def test_every_denoiser_computes_in_int8(folder: Path) -> None:
    with danqing.open(folder, device="cpu", quantize="int8") as engine:
        assert {part.arithmetic for part in denoisers(engine).values()} == {"int8"}
        assert len(set(engine.generate("a cat", **SMALL).image.tobytes())) > 1


def test_every_denoiser_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own do-nothing compiler, which takes no C++."""
    from danqing.devices.cpu import Cpu

    monkeypatch.setattr(Cpu, "compiler", lambda *_: "eager")
    with danqing.open(folder, device="cpu", compile="inductor") as engine:
        (picture,) = engine.generate("a cat", **SMALL).pictures
        compiled = {
            name
            for name, module in engine._residence.modules.items()
            if any(layer._compiled_call_impl is not None for layer in module.modules())
        }
    assert compiled == set(engine.stages["denoise"])
    assert sum(cost.compile_seconds for cost in picture.stages) > 0


def test_a_trace_is_as_large_as_foretold(folder: Path) -> None:
    sizes = []
    with danqing.open(folder, device="cpu") as engine:
        request = engine.spec.resolve(Request(prompt="a cat", **SMALL))
        engine.probe(request, lambda _, array: sizes.append(array.bits.nbytes))
        assert engine.trace_bytes(request) == sum(sizes)


def test_a_fault_in_the_last_denoiser_is_found(folder: Path, tmp_path: Path) -> None:
    """By its name, in the step in which it is called."""

    def opened() -> danqing.Engine:
        return danqing.open(folder, device="cpu", dtype="float32")

    with opened() as engine:
        name = engine.stages["denoise"][-1]
        request = engine.spec.resolve(Request(prompt="a cat", **SMALL))
    path = "single_transformer_blocks.0.attn.to_v"
    scaled = faults.at(path, faults.weight(lambda values: values * 1.5))
    fault = faults.Fault("a scaled layer", name, scaled, path)
    found = check_parity(
        exact=opened, reference=opened, candidate=lambda: faults.plant(opened(), fault),
        request=request, folder=tmp_path,
    )  # fmt: skip
    assert found.first_failure is not None
    assert found.culprit == f"{name}/{path}"
