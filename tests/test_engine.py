"""The engine: seeds, stages, placement, and what happens when something fails inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import danqing
from danqing import devices, plan
from danqing.devices.base import Memory
from danqing.devices.cpu import Cpu
from danqing.errors import BrokenPictureError, DoesNotFitError, DtypeError, RequestError
from danqing.request import Request

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.generation import Progress

SMALL: dict[str, Any] = {"height": 64, "width": 64}


def test_a_generation_knows_everything(engine: danqing.Engine) -> None:
    generation = engine.generate("a cat", seed=5, num_images_per_prompt=2, **SMALL)
    record = generation.request.model_dump(exclude_none=True)
    assert record == {
        "prompt": "a cat", "seed": 5, "num_images_per_prompt": 2, **engine.spec.defaults, **SMALL,
    }  # fmt: skip
    assert [picture.request.seed for picture in generation.pictures] == [5, 6]
    assert [picture.request.num_images_per_prompt for picture in generation.pictures] == [1, 1]
    for picture in generation.pictures:
        costs = {cost.name: cost for cost in picture.stages}
        assert costs["denoise"].steps == 4
        assert costs["encode"].pictures == 2
        assert costs["denoise"].pictures == 1
        assert all((cost.seconds > 0) != cost.reused for cost in costs.values())
        assert all((cost.peak_bytes or 1) > 0 for cost in costs.values())
    assert generation.provenance.versions["torch"] == torch.__version__
    assert generation.provenance.device["threads"] == torch.get_num_threads()


def test_a_request_can_be_given_and_changed(engine: danqing.Engine) -> None:
    request = Request(prompt="a cat", seed=1, **SMALL)
    again = engine.generate(request).image.tobytes()
    assert engine.generate("a cat", seed=1, **SMALL).image.tobytes() == again
    assert engine.generate(request, seed=2).request.seed == 2


def test_float16_keeps_in_float32_what_overflows(schnell: Path) -> None:
    with danqing.open(schnell, device="cpu", dtype="float16") as engine:
        engine.load()
        planned = {part.name: part.dtype for part in engine.plan.components}
        assert planned == {
            "text_encoder": "float16", "text_encoder_2": "float16", "transformer": "float16",
            "vae": "float32",
        }  # fmt: skip
        t5 = engine._residence.modules["text_encoder_2"]
        kinds = {name.split(".")[-2]: value.dtype for name, value in t5.named_parameters()}
        assert kinds["wo"] is torch.float32
        assert kinds["wi_0"] is torch.float16


def test_listeners_hear_bytes_and_steps(schnell: Path) -> None:
    heard: list[Progress] = []
    with danqing.open(schnell, device="cpu") as engine:
        engine.generate("a cat", listen=heard.append, num_inference_steps=3, **SMALL)
    steps = [report for report in heard if report.stage == "denoise"]
    assert [report.done for report in steps] == [1, 2, 3]
    loads = {report.item: report for report in heard if report.stage == "load"}
    assert set(loads) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert all(report.done == report.total > 0 for report in loads.values())


def test_a_closed_engine_loads_again(schnell: Path) -> None:
    with danqing.open(schnell, device="cpu") as engine:
        first = engine.generate("a cat", seed=1, **SMALL).image.tobytes()
    assert engine._residence.modules == {}
    assert engine.generate("a cat", seed=1, **SMALL).image.tobytes() == first


def test_out_of_memory_is_told_and_the_next_request_works(
    engine: danqing.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        torch.empty(2**60)

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "decode", exhausted)
        with pytest.raises(DoesNotFitError, match="in decode"):
            engine.generate("a cat", **SMALL)
    engine.generate("a cat", **SMALL)


def test_the_first_bad_step_is_named(
    engine: danqing.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = engine._residence.load(("transformer",), [], None)["transformer"]
    forward, calls = transformer.forward, []

    def spoil(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        out = forward(*args, **kwargs)
        return (out[0] * float("nan"),) if len(calls) == 3 else out

    monkeypatch.setattr(transformer, "forward", spoil)
    with pytest.raises(BrokenPictureError, match="after step 3 of 4") as caught:
        engine.generate("a cat", **SMALL)
    assert "the weights are finite" in str(caught.value)


@pytest.mark.parametrize("batch", [0, 65, -1])
def test_batches_out_of_range(engine: danqing.Engine, batch: int) -> None:
    with pytest.raises(RequestError, match="batch"):
        engine.generate("a cat", batch=batch)


# --- plans ---------------------------------------------------------------------------------------


def with_memory(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    memory = Memory(total_bytes=2**34, free_bytes=free_bytes)
    monkeypatch.setattr(Cpu, "memory", lambda _: memory)
    monkeypatch.setattr(Cpu, "base_bytes", lambda _: 0)  # the process's own is left out of it


def test_what_does_not_fit_at_once_is_staged(
    schnell: Path, engine: danqing.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with danqing.open(schnell, device="cpu") as whole:
        needed = whole.plan.predicted_peak_bytes - Cpu().base_bytes()
    with_memory(monkeypatch, needed)  # of which a tenth is left alone
    with danqing.open(schnell, device="cpu") as staged:
        assert staged.plan.placement == "staged"
        assert "in decode" in staged.plan.placement_reason
        assert "resident would take" in staged.plan.placement_reason
        picture = staged.generate("a cat", seed=1, **SMALL)
        assert staged._residence.modules.keys() == set(staged.plan.kept) < set(staged._model.parts)
    assert picture.image.tobytes() == engine.generate("a cat", seed=1, **SMALL).image.tobytes()
    assert [cost.name for cost in picture.stages] == [
        "load",
        "load",
        "encode",
        "load",
        "denoise",
        "load",
        "decode",
    ]


def test_a_staged_engine_keeps_nothing_after_an_error(
    schnell: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with danqing.open(schnell, device="cpu", placement="staged") as staged:
        assert staged.plan.kept == ()
        monkeypatch.setattr(staged._model, "denoise", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            staged.generate("a cat", **SMALL)
        assert staged._residence.modules == {}


def test_reading_beforehand_is_paid_by_the_first_picture(schnell: Path) -> None:
    with danqing.open(schnell, device="cpu") as engine:
        engine.load()
        first, second = (engine.generate("a cat", **SMALL).stages for _ in range(2))
        weights = [w for module in engine._residence.modules.values() for w in module.parameters()]
        assert not any(weight.is_inference() for weight in weights)
    loads, work = first[:4], first[4:]
    assert [cost.component for cost in loads] == [
        "text_encoder",
        "text_encoder_2",
        "transformer",
        "vae",
    ]
    assert all(cost.name == "load" and cost.peak_bytes for cost in loads)
    assert [cost.name for cost in work] == ["encode", "denoise", "decode"]
    assert [(cost.name, cost.reused) for cost in second] == [
        ("encode", True), ("denoise", False), ("decode", False),
    ]  # fmt: skip


def test_what_does_not_fit_at_all_is_refused(
    schnell: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, 2 * 2**20)
    with pytest.raises(DoesNotFitError, match="in decode") as caught:
        danqing.open(schnell, device="cpu")
    assert "--memory 0.1GiB would do" in str(caught.value)


def plan_for(folder: Path, dtype: str = "auto") -> plan.Plan:
    with danqing.open(folder, device="cpu", dtype=dtype) as engine:
        return engine.plan


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import toys

    return toys.write_diffusers(tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16)


def test_stored_dtype_is_kept_where_it_is_native(
    bfloat16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danqing.devices.cpu.cpu_flags", lambda: frozenset({"avx512_bf16"}))
    chosen = plan_for(bfloat16)
    assert chosen.dtype == "bfloat16"
    assert all(part.mapped for part in chosen.components)


def test_a_processor_without_bfloat16_takes_float32_if_it_fits(
    bfloat16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danqing.devices.cpu.cpu_flags", lambda: frozenset({"avx2"}))
    assert plan_for(bfloat16).dtype == "float32"
    with_memory(monkeypatch, 11 * 2**19)
    tight = plan_for(bfloat16)
    assert tight.dtype == "bfloat16"
    assert "emulated, slow" in tight.dtype_reason
    assert "emulated" in plan_for(bfloat16, "bfloat16").dtype_reason


class OldCard(Cpu):
    """A card with memory of its own and without bfloat16, such as an Ascend 910A or 310P."""

    def computes(self, dtype: str) -> Any:
        return "no" if dtype == "bfloat16" else "native"

    def shares_host_memory(self) -> bool:
        return False


def test_a_card_without_bfloat16_takes_float16(
    bfloat16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = devices.Selection(device=OldCard(), reason="asked for")
    monkeypatch.setattr(devices, "select", lambda _: selection)
    chosen = plan_for(bfloat16)
    assert chosen.dtype == "float16"
    assert not any(part.mapped for part in chosen.components)
    with pytest.raises(DtypeError, match="does not compute in bfloat16"):
        plan_for(bfloat16, "bfloat16")
