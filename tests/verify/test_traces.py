"""Traces: what is in them, what a foreign reader finds, what a damaged one says; determinism."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import danqing
from danqing.arrays import Array
from danqing.cli import app
from danqing.errors import TraceError
from danqing.verify.determinism import check_determinism
from danqing.verify.joints import compare_traces
from danqing.verify.runs import record
from danqing.verify.trace import Recorder, read_trace
from tests.conftest import call_danqing

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.request import Resolved

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}


def resolved(engine: danqing.Engine, **settings: Any) -> Resolved:
    return engine.spec.resolve(danqing.Request(prompt="a cat", **{**SMALL, **settings}))


def test_the_joints_of_a_run(engine: danqing.Engine, tmp_path: Path) -> None:
    trace = record(engine, resolved(engine), tmp_path / "a.trace")
    assert list(trace.joints) == [
        "encode/prompt_embeds", "encode/pooled_embeds", "draw/0",
        "denoise/0001/velocity", "denoise/0001/latents",
        "denoise/0002/velocity", "denoise/0002/latents", "decode/pixels",
    ]  # fmt: skip
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    found = trace.read("draw/0")
    assert found is not None
    assert np.array_equal(found.bits, noise.numpy())
    assert trace.about["request"]["seed"] == 3
    assert trace.about["provenance"]["versions"]["torch"] == torch.__version__
    image = engine.generate(resolved(engine)).image
    pixels = trace.read("decode/pixels")
    assert pixels is not None
    values = pixels.values()[0].astype(np.float32)
    levels = ((values / 2 + 0.5).clip(0, 1) * 255).round().transpose(1, 2, 0)
    assert np.array_equal(levels.astype(np.uint8), np.asarray(image))


def test_edits_show_their_pictures_and_draws(deepgen: Path, tmp_path: Path) -> None:
    from PIL import Image

    with danqing.open(deepgen, device="cpu") as engine:
        request = resolved(engine, image=Image.new("RGB", (64, 64), "teal"))
        trace = record(engine, request, tmp_path / "a.trace")
    names = list(trace.joints)
    assert names[:6] == [
        "encode/context", "encode/pooled", "encode/means/0", "encode/deviations/0", "draw/0", "draw/1",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_other_readers_find_the_same(schnell: Path, tmp_path: Path, dtype: str) -> None:
    """The file is a safetensors file to the library that defines them."""
    with danqing.open(schnell, device="cpu", dtype=dtype) as engine:
        trace = record(engine, resolved(engine), tmp_path / "a.trace")
    theirs = load_file(tmp_path / "a.trace")
    assert theirs.keys() == trace.joints.keys()
    for name, tensor in theirs.items():
        ours = trace.read(name)
        assert ours is not None
        assert ours.dtype == str(tensor.dtype).removeprefix("torch.")
        assert np.array_equal(ours.values(), tensor.double().numpy())
        assert ours.sha256 == trace.joints[name].sha256


def test_digests_alone_are_small_and_tell_the_first_that_differs(
    engine: danqing.Engine, tmp_path: Path
) -> None:
    whole = record(engine, resolved(engine), tmp_path / "whole.trace")
    same = record(engine, resolved(engine), tmp_path / "same.trace", digests=True)
    other = record(engine, resolved(engine, seed=4), tmp_path / "other.trace", digests=True)
    assert same.path.stat().st_size < whole.path.stat().st_size / 2
    assert compare_traces(same, whole).identical
    found = compare_traces(other, whole)
    assert found.first_divergence is not None
    assert found.first_divergence.name == "draw/0"
    assert found.settings == {"seed": (3, 4)}


def test_what_a_probe_returns_is_taken(engine: danqing.Engine, tmp_path: Path) -> None:
    """Another run's noise and conditioning in place of one's own give that run's picture."""
    reference = record(engine, resolved(engine), tmp_path / "a.trace")

    def forced(name: str, _: Array) -> Array | None:
        return reference.read(name) if name.startswith(("encode/", "draw/")) else None

    request = resolved(engine, seed=99)
    picture = engine.probe(request.request.replace(prompt="a dog"), forced)
    assert picture.image.tobytes() == engine.generate(resolved(engine)).image.tobytes()
    assert picture.image.tobytes() != engine.generate(request).image.tobytes()
    only = engine.probe(
        request, lambda name, _: reference.read(name) if name == "decode/pixels" else None
    )
    assert only.image.tobytes() == picture.image.tobytes()


def test_of_a_batch_the_first_picture_is_shown(engine: danqing.Engine, tmp_path: Path) -> None:
    alone = record(engine, resolved(engine), tmp_path / "a.trace")
    many = record(engine, resolved(engine, num_images_per_prompt=3), tmp_path / "b.trace")
    shapes = {name: joint.shape for name, joint in alone.joints.items()}
    assert {name: joint.shape for name, joint in many.joints.items()} == shapes
    assert many.joints["draw/0"].sha256 == alone.joints["draw/0"].sha256
    found = compare_traces(many, alone)
    far = [joint.distance.relative for joint in found.joints if joint.distance]
    assert max(far, default=0) < 1e-5


def test_the_size_is_known_beforehand(
    engine: danqing.Engine, deepgen: Path, tmp_path: Path
) -> None:
    from PIL import Image

    trace = record(engine, resolved(engine), tmp_path / "a.trace")
    assert engine.trace_bytes(resolved(engine)) == sum(j.size_bytes for j in trace.joints.values())
    for dtype in ("float32", "bfloat16"):
        with danqing.open(deepgen, device="cpu", dtype=dtype) as edits:
            request = resolved(edits, image=Image.new("RGB", (96, 64), "teal"))
            trace = record(edits, request, tmp_path / "b.trace")
            kept = sum(joint.size_bytes for joint in trace.joints.values())
            assert edits.trace_bytes(request) == kept


def test_a_failed_run_leaves_no_trace(engine: danqing.Engine, tmp_path: Path) -> None:
    def fail() -> None:
        with Recorder(tmp_path / "a.trace") as recorder:
            engine.probe(resolved(engine), recorder)
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


DAMAGE: dict[str, Any] = {
    "nothing there": lambda _: None,
    "empty": lambda _: b"",
    "a picture": lambda _: b"\x89PNG\r\n\x1a\n" + bytes(100),
    "cut short": lambda data: data[:-50],
    "cut in the header": lambda data: data[:60],
    "another safetensors file": lambda _: (2).to_bytes(8, "little") + b"{}",
    "another schema": lambda data: data.replace(b'\\"schema\\": 1', b'\\"schema\\": 9'),
    "an odd dtype": lambda data: data.replace(b'\\"dtype\\": \\"float32\\"', b'\\"dtype\\": \\"floatXX\\"'),
    "a negative side": lambda data: data.replace(b'\\"shape\\": [1, 16', b'\\"shape\\": [-1,16'),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_and_foreign_files(kind: str, engine: danqing.Engine, tmp_path: Path) -> None:
    place = tmp_path / "a.trace"
    data = DAMAGE[kind](record(engine, resolved(engine), place).path.read_bytes())
    if data is None:
        place.unlink()
    else:
        place.write_bytes(data)
    with pytest.raises(TraceError) as caught:
        read_trace(place)
    assert str(place) in str(caught.value)


def test_traces_of_different_things_have_nothing_in_common(tmp_path: Path) -> None:
    traces = []
    for name in ("one", "two"):
        with Recorder(tmp_path / name) as recorder:
            recorder(f"{name}/x", Array("float32", np.zeros(3, np.float32)))
            traces.append(recorder.finish({}))
    with pytest.raises(TraceError, match="nothing in common"):
        compare_traces(*traces)


# --- determinism ---------------------------------------------------------------------------------


def test_a_deterministic_run(engine: danqing.Engine, tmp_path: Path) -> None:
    found = check_determinism(engine, resolved(engine), folder=tmp_path, batch=2)
    assert found.passed
    assert [repeat.way for repeat in found.repeats] == [
        "again in this process", "after another request", "after loading again",
    ]  # fmt: skip
    assert found.batch is not None
    assert found.batch.largest <= 2
    assert found.batch.size == 2


@pytest.mark.parametrize(
    ("stage", "expected"),
    [("transformer", "denoise/0001/velocity"), ("vae", "decode/pixels"), ("text_encoder", "encode/pooled_embeds")],
)  # fmt: skip
def test_the_first_stage_that_is_not_the_same_is_named(
    schnell: Path, tmp_path: Path, stage: str, expected: str
) -> None:
    """A network whose last bits depend on how often it was asked."""
    with danqing.open(schnell, device="cpu") as engine:
        build, count = engine._residence.build, [0]

        def uneven(name: str, listen: Any) -> Any:
            module = build(name, listen)
            if name != stage:
                return module

            def shake(_: Any, __: Any, out: Any) -> Any:
                count[0] += 1
                return _shaken(out, 1 + 1e-6 * count[0])

            module.register_forward_hook(shake)
            if name == "vae":
                module.decoder.register_forward_hook(shake)
            return module

        engine._residence.build = uneven  # type: ignore[method-assign]
        found = check_determinism(engine, resolved(engine), folder=tmp_path)
    assert not found.passed
    for repeat in found.repeats:
        assert repeat.comparison.first_divergence is not None
        assert repeat.comparison.first_divergence.name == expected
        assert repeat.comparison.first_divergence.distance is not None


def _shaken(out: Any, factor: float) -> Any:
    if isinstance(out, torch.Tensor):
        return out * factor
    if isinstance(out, tuple):
        return tuple(_shaken(one, factor) for one in out)
    for name, value in out.items():
        out[name] = _shaken(value, factor)
    return out


@pytest.mark.slow
def test_from_the_command_line(schnell: Path, tmp_path: Path) -> None:
    flags = ("-m", schnell, "--device", "cpu", "--steps", 2, "--height", 64, "--width", 64)
    done = call_danqing("verify", "determinism", "a cat", *flags, "--batch", 2)
    assert done.returncode == 0, done.stderr
    assert "in another process" in done.stdout
    assert done.stdout.rstrip().endswith("\ndeterministic")
    for name, seed in (("a", 1), ("b", 2)):
        done = call_danqing(
            "trace", *flags, "--seed", seed, "--out", tmp_path / f"{name}.trace", "--", "-5 degrees"
        )
        assert done.returncode == 0, done.stderr
    runner = CliRunner()
    both = [str(tmp_path / "b.trace"), str(tmp_path / "a.trace")]
    told = runner.invoke(app, ["verify", "traces", *both])
    assert told.exit_code == 0
    assert "different from draw/0 on" in told.stdout
    assert "seed is 2, of the reference 1" in told.stdout
    strict = runner.invoke(app, ["verify", "traces", *both, "--require", "identical", "--json"])
    assert strict.exit_code == 1
    report = json.loads(strict.stdout)
    assert report["first_divergence"] == "draw/0"
    assert [joint["identical"] for joint in report["joints"]][:3] == [True, True, False]
    same = runner.invoke(app, ["verify", "traces", both[0], both[0], "--require", "identical"])
    assert same.exit_code == 0
    assert runner.invoke(app, ["verify", "traces", *both, "--require", "alike?"]).exit_code == 2
    assert runner.invoke(app, ["verify", "traces", both[0], "nowhere.trace"]).exit_code == 10


@pytest.mark.slow
def test_inside_a_network_a_sample_is_kept(tmp_path: Path) -> None:
    """Of every block or module: other readers find the very values that were computed."""
    place = tmp_path / "a.trace"
    ran = call_danqing(
        "trace", "a boat", "--out", place, "--depth", "module", "--dtype", "float32", "--seed", 1
    )
    assert ran.returncode == 0, ran.stderr
    trace = read_trace(place)
    inside = [joint for joint in trace.joints.values() if joint.name.startswith("inside/")]
    assert {joint.name.split("/")[1] for joint in inside} == {
        "text_encoder", "text_encoder_2", "transformer", "vae",
    }  # fmt: skip
    assert max(joint.sample or 0 for joint in inside) == 4096
    theirs = load_file(place)
    velocity = theirs["denoise/0001/velocity"].flatten()
    last = next(joint for joint in inside if joint.name == "inside/transformer/proj_out/0001/0")
    kept = theirs[last.name].flatten()
    size = velocity.numel()
    assert torch.equal(
        kept,
        velocity
        if last.sample is None
        else velocity[torch.from_numpy(np.linspace(0, size - 1, 4096).astype(np.int64))],
    )
    said = re.search(r"at most ([\d.]+) MiB inside", ran.stderr)
    assert said is not None
    assert place.stat().st_size < float(said[1]) * 2**20 + 400_000
    same = call_danqing("verify", "traces", place, place, "--require", "identical")
    assert same.returncode == 0
    block = call_danqing("trace", "a boat", "--out", place, "--depth", "block", "--seed", 1, "-q")
    assert block.returncode == 0
    assert len(read_trace(place).joints) < len(trace.joints) / 4
    bad = call_danqing("trace", "a boat", "--out", place, "--depth", "atom")
    assert bad.returncode == 2
    assert "joint, block, module" in bad.stderr


@pytest.mark.slow
def test_a_trace_of_a_12b_model_stays_small(tmp_path: Path) -> None:
    """FLUX.1 at 1024x1024 in 4 steps, every block sampled: the tensors have their real shapes."""
    hidden = Array("bfloat16", np.zeros((1, 4096, 3072), np.uint16))
    text = Array("bfloat16", np.zeros((1, 512, 3072), np.uint16))
    latents = Array("bfloat16", np.zeros((1, 4096, 64), np.uint16))
    resource_before = high_water()
    with Recorder(tmp_path / "a.trace", sample=4096) as recorder:
        recorder("encode/prompt_embeds", Array("bfloat16", np.zeros((1, 512, 4096), np.uint16)))
        for step in range(1, 5):
            for block in range(57):
                name = f"inside/transformer/blocks.{block}/{step:04}"
                recorder(f"{name}/0", text)
                recorder(f"{name}/1", hidden)
            recorder(f"denoise/{step:04}/velocity", latents)
            recorder(f"denoise/{step:04}/latents", latents)
        recorder("decode/pixels", Array("bfloat16", np.zeros((1, 3, 1024, 1024), np.uint16)))
        recorder.finish({"request": {}, "provenance": {}})
    assert (tmp_path / "a.trace").stat().st_size < 20 * 2**20
    assert high_water() - resource_before < 100 * 2**20


def high_water() -> int:
    from pathlib import Path as Place

    lines = Place("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow
def test_what_determinism_costs() -> None:
    ran = call_danqing(
        "verify", "determinism", "a boat", "--cost", "--json", "--no-process", "--steps", 1
    )
    assert ran.returncode == 0, ran.stderr
    cost = json.loads(ran.stdout)["cost"]
    assert cost["seconds"] > 0
    assert cost["deterministic_seconds"] > 0
    assert cost["identical"] is True


def test_traces_of_two_versions_of_torch_compare_without_a_model() -> None:
    """Made with torch 2.9.0 and 2.13.0 on one machine, AMD EPYC, 2026-11-21."""
    from pathlib import Path as Place

    folder = Place(__file__).parent / "traces"
    old, new = (read_trace(folder / f"torch-{version}.trace") for version in ("2.9.0", "2.13.0"))
    versions = [one.about["provenance"]["versions"]["torch"] for one in (old, new)]
    assert [version.split("+")[0] for version in versions] == ["2.9.0", "2.13.0"]
    found = compare_traces(new, old)
    assert found.only == ()
    assert {"denoise/0001/velocity", "decode/pixels"} <= {joint.name for joint in found.joints}
    assert next(joint for joint in found.joints if joint.name == "draw/0").identical
    for joint in found.joints:
        assert joint.identical or (joint.distance and joint.distance.relative < 1e-4), joint.name
    ran = call_danqing("verify", "traces", new.path, old.path, "--json")
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["only_in_one"] == []
