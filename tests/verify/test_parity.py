"""Parity: every planted fault is caught and named, honest differences pass."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

import danqing
from danqing.arrays import Array
from danqing.verify.parity import FACTOR, check_parity, prepare_from_trace, report
from danqing.verify.parity import judge as judge_candidate
from danqing.verify.runs import record
from danqing.verify.trace import read_trace
from tests import faults
from tests.conftest import call_danqing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from danqing.verify.parity import Parity

PROMPT = "three blue mountains under a red sun, a boat on the water"


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    yield
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


def judge(
    place: str,
    folder: Path,
    candidate: Callable[[], danqing.Engine],
    dtype: str = "float32",
    **settings: Any,
) -> Parity:
    with danqing.open(place, device="cpu") as engine:
        request = engine.spec.resolve(danqing.Request(prompt=PROMPT, seed=3, **settings))
    return check_parity(
        exact=lambda: danqing.open(place, device="cpu", dtype="float32"),
        reference=lambda: danqing.open(place, device="cpu", dtype=dtype),
        candidate=candidate,
        request=request,
        folder=folder,
    )


def edit() -> dict[str, Any]:
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((96, 64))
    return {"height": 64, "width": 64, "num_inference_steps": 2, "image": image}


def every_third(found: Sequence[faults.Fault]) -> list[Any]:
    """All faults, of which every third is in each run and the others in the slow ones."""
    return [
        pytest.param(fault, id=fault.what, marks=() if number % 3 == 0 else pytest.mark.slow)
        for number, fault in enumerate(found)
    ]


@pytest.mark.parametrize("fault", every_third(faults.POCKET))
def test_faults_in_the_pocket_model(fault: faults.Fault, tmp_path: Path) -> None:
    def candidate() -> danqing.Engine:
        return faults.plant(danqing.open("pocket", device="cpu", dtype="float32"), fault)

    found = judge("pocket", tmp_path, candidate)
    assert found.first_failure is not None
    assert not found.reaches("close")
    assert faults.is_named(fault, found.culprit, found.first_failure.stage), found.search


@pytest.mark.parametrize("fault", every_third(faults.DEEPGEN))
def test_faults_in_deepgen(fault: faults.Fault, deepgen: Path, tmp_path: Path) -> None:
    def candidate() -> danqing.Engine:
        return faults.plant(danqing.open(deepgen, device="cpu", dtype="float32"), fault)

    found = judge(str(deepgen), tmp_path, candidate, **edit())
    assert found.first_failure is not None
    assert faults.is_named(fault, found.culprit, found.first_failure.stage), found.search


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("threads", "one_dnn"), [(1, True), (2, True), (1, False)])
def test_honest_differences_pass(dtype: str, threads: int, one_dnn: bool, tmp_path: Path) -> None:
    """Another number of threads, other kernels: other bits, no fault."""

    def candidate() -> danqing.Engine:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.enabled = one_dnn  # type: ignore[assignment]
        return danqing.open("pocket", device="cpu", dtype=dtype)

    found = judge("pocket", tmp_path, candidate, dtype)
    assert found.first_failure is None
    assert found.reaches("close")
    assert found.culprit is None
    if threads == 1 and one_dnn:
        assert found.rung == "identical"
    for joint in found.joints:
        assert joint.limit == FACTOR * joint.precision


def test_precision_is_told_from_the_port(tmp_path: Path) -> None:
    """In bfloat16 without oneDNN the free picture drifts far; step by step nothing is wrong."""

    def candidate() -> danqing.Engine:
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        return danqing.open("pocket", device="cpu", dtype="bfloat16")

    found = judge("pocket", tmp_path, candidate, "bfloat16")
    torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
    assert found.rung == "close"
    last = found.joints[-1]
    assert last.name == "decode/pixels"
    assert last.port <= 1.5 * last.precision
    assert json.dumps(report(found))


def test_a_fault_smaller_than_the_precision_is_not_seen_in_it(tmp_path: Path) -> None:
    """The reason to look in float32 first."""
    fault = next(one for one in faults.POCKET if one.what.startswith("exact GELU"))

    def candidate() -> danqing.Engine:
        return faults.plant(danqing.open("pocket", device="cpu", dtype="bfloat16"), fault)

    assert judge("pocket", tmp_path, candidate, "bfloat16").rung == "close"


def test_numbers_that_are_not_finite_fail(tmp_path: Path) -> None:
    def candidate() -> Any:
        engine: Any = danqing.open("pocket", device="cpu", dtype="float32")
        probe = engine.probe

        def spoiled(request: Any, look: Any, **options: Any) -> Any:
            def with_nan(name: str, array: Array) -> Any:
                if name == "encode/pooled_embeds":
                    bits = array.bits.copy()
                    bits[0, 0] = np.nan
                    array = Array(array.dtype, bits)
                return look(name, array)

            return probe(request, with_nan, **options)

        engine.probe = spoiled
        return engine

    found = judge("pocket", tmp_path, candidate)
    assert found.first_failure is not None
    assert found.first_failure.name == "encode/pooled_embeds"
    assert json.loads(json.dumps(report(found)))["joints"][1]["port"] is None


@pytest.mark.slow
def test_from_the_command_line() -> None:
    done = call_danqing("verify", "parity", "--candidate", "cpu", "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("identical")
    done = call_danqing("verify", "parity", "--candidate", "cpu", "--seed", 1, "--json")
    assert json.loads(done.stdout)["rung"] == "identical"
    done = call_danqing("verify", "parity", "--require", "perfect")
    assert done.returncode == 2
    assert "identical, close, alike, any" in done.stderr


def traced(place: str, home: Path, dtype: str, **settings: Any) -> Path:
    with danqing.open(place, device="cpu", dtype=dtype) as engine:
        request = engine.spec.resolve(danqing.Request(prompt=PROMPT, seed=3, **settings))
        return record(engine, request, home / f"{dtype}.trace").path


def test_a_trace_is_a_reference(tmp_path: Path) -> None:
    """Of another machine perhaps: its request is taken, and its noise."""
    place = traced("pocket", tmp_path, "bfloat16")
    ran = call_danqing(
        "verify", "parity", "--reference", place, "--candidate", "cpu", "--json", "-q"
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["candidate"]["dtype"] == "bfloat16"
    assert found["rung"] in {"identical", "close"}  # the other process may have more threads
    assert found["precision"]["psnr_db"] < 60


def test_a_fault_is_found_against_a_trace(tmp_path: Path) -> None:
    fault = next(one for one in faults.POCKET if one.what.startswith("a block skipped"))
    trace = read_trace(traced("pocket", tmp_path, "float32"))

    def opened() -> danqing.Engine:
        return danqing.open("pocket", device="cpu", dtype="float32")

    with opened() as engine:
        request = engine.spec.resolve(danqing.Request(**trace.about["request"]))
    baseline = prepare_from_trace(trace, opened, opened, request=request, folder=tmp_path)
    assert judge_candidate(baseline, opened).rung == "identical"
    found = judge_candidate(baseline, lambda: faults.plant(opened(), fault))
    assert found.first_failure is not None
    assert faults.is_named(fault, found.culprit, found.first_failure.stage), found.search
    assert found.inputs
    names = [name for name, _ in found.inputs]
    assert "hidden_states/0" in names
    for _, seen in found.inputs:
        assert seen.dtype == "float32"
        assert seen.least is not None
        assert seen.most is not None
        assert seen.least <= (seen.mean or 0) <= seen.most


@pytest.mark.slow
def test_what_cannot_be_a_reference(tmp_path: Path, schnell: Path) -> None:
    place = traced("pocket", tmp_path, "float32")
    for arguments, wanted, code in (
        (["a dog"], "another prompt", 2),
        (["--seed", "4"], "another seed", 2),
        (["-m", str(schnell)], "other weights", 10),
    ):
        ran = call_danqing("verify", "parity", *arguments, "--reference", place, "-q")
        assert ran.returncode == code, ran.stderr
        assert wanted in ran.stderr
    with danqing.open("pocket", device="cpu") as engine:
        request = engine.spec.resolve(danqing.Request(prompt=PROMPT, seed=3))
        digests = record(engine, request, tmp_path / "digests.trace", digests=True)
    ran = call_danqing("verify", "parity", "--reference", digests.path, "-q")
    assert ran.returncode == 10
    assert "digests alone" in ran.stderr
    ran = call_danqing("verify", "parity", "--reference", tmp_path / "missing.trace", "-q")
    assert ran.returncode == 10
