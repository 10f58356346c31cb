"""Networks whose blocks come and go: the same bits, little memory, and no wrong picture."""

from __future__ import annotations

import dataclasses
import os
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

import danqing
from danqing import devices
from danqing.errors import CheckpointDamagedError, DoesNotFitError, RequestError
from danqing.models import identify, open_checkpoint, open_model
from danqing.networks.streaming import Ring, streamed_part
from danqing.networks.units import units_of
from danqing.plan.budget import Block, Part, Work, streamings
from danqing.request import Request
from danqing.weights.ranges import BLOCK, RangeReader, Span, as_memory, lay_out
from danqing.weights.tensor_file import Identity
from tests import deepgen_toys, layouts, toys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from danqing.generation import Picture, Progress
    from danqing.networks.streaming import Streamed

CPU = "cpu"


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_diffusers(tmp_path_factory.mktemp("flux"), guided=True)


@pytest.fixture(scope="module")
def deepgen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepgen_toys.write(tmp_path_factory.mktemp("deepgen"))


def paint(place: Path, *, count: int = 1, batch: int = 1, **opening: object) -> list[Picture]:
    with danqing.open(place, device=CPU, **opening) as engine:
        request = Request(
            prompt="a boat", seed=3, height=64, width=96, num_inference_steps=3,
            num_images_per_prompt=count,
        )  # fmt: skip
        return list(engine.generate(request, batch=batch).pictures)


# --- the same bits -------------------------------------------------------------------------------


def _as_bfl(flux: Path, place: Path) -> dict[str, object]:
    return {"place": toys.write_bfl(place / "bfl", flux)}


def _as_gguf(flux: Path, place: Path) -> dict[str, object]:
    state = layouts.states(flux)["transformer"]
    layouts.write_gguf(place / "flux.gguf", "flux", state, "Q8_0")
    return {"place": flux, "components": {"transformer": place / "flux.gguf"}}


def _as_scaled_fp8(flux: Path, place: Path) -> dict[str, object]:
    state = layouts.states(flux)["transformer"]
    layouts.save(place / "fp8.safetensors", layouts.fp8_scaled(state, ".scale_weight"))
    return {"place": flux, "components": {"transformer": place / "fp8.safetensors"}}


@pytest.mark.parametrize("write", [_as_bfl, _as_gguf, _as_scaled_fp8], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layout_streams(
    write: Callable[[Path, Path], dict[str, object]], dtype: str, flux: Path, tmp_path: Path
) -> None:
    """Fused rows, swapped halves, scaled fp8 and GGUF blocks are decoded from the bytes read."""
    opening = write(flux, tmp_path)
    kept, streamed = (
        paint(**opening, dtype=dtype, placement=placement)[0].pixels_sha256  # type: ignore[arg-type]
        for placement in ("resident", "streamed")
    )
    assert kept == streamed


def test_some_blocks_may_stay(flux: Path) -> None:
    """Which ones makes no difference to the bits, nor how long the ring is."""
    checkpoint = open_checkpoint(flux)
    device = devices.select(CPU).device
    model = open_model(checkpoint, identify(checkpoint))
    units = model.units("transformer")
    largest = max(size for _, size in units)
    from danqing.networks.streaming import Streaming

    outputs = []
    for stay, ring in ((), 1.0), ((), 2.5), (("transformer_blocks.1",), 1.0):
        memory = Ring(int(ring * largest), device)
        reader = RangeReader(direct=True)
        streaming = Streaming(device, memory, reader, {"transformer": stay})
        network = model.build(
            "transformer", dtype="bfloat16", device=device.torch_device,
            on_bytes=lambda _: None, streaming=streaming,
        )  # fmt: skip
        inputs = _inputs(network)
        with torch.inference_mode():
            outputs.append(network(**inputs)[0])
        streaming.close()
        empty = [p for name, p in network.named_parameters() if name.startswith("single_")]
        assert not any(parameter.numel() for parameter in empty)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def _inputs(network: torch.nn.Module) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    ids = torch.zeros(24, 3)
    network.pos_embed.prepare(ids, torch.device(CPU))  # type: ignore[operator, union-attr]
    return {
        "hidden_states": draw(1, 16, 64), "encoder_hidden_states": draw(1, 8, 32),
        "pooled_projections": draw(1, 32), "timestep": torch.tensor([0.5]).bfloat16(),
        "guidance": torch.tensor([3.5]), "img_ids": ids[8:], "txt_ids": ids[:8],
        "return_dict": False,
    }  # fmt: skip


def test_what_is_needed_once_is_no_part_of_a_block(flux: Path) -> None:
    checkpoint = open_checkpoint(flux)
    model = open_model(checkpoint, identify(checkpoint))
    units = [unit for unit, _ in model.units("transformer")]
    once = [unit.name for unit in units if unit.once]
    assert "transformer_blocks.0.norm1.linear" in once
    assert "norm_out.linear" in once
    blocks = [unit for unit in units if not unit.once]
    assert [unit.name for unit in blocks] == [
        "transformer_blocks.0", "transformer_blocks.1",
        "single_transformer_blocks.0", "single_transformer_blocks.1",
    ]  # fmt: skip
    network, pieces = model.matched("transformer")
    named = [tensor for unit in units for tensor in unit.tensors]
    assert len(named) == len(set(named))
    assert set(named) <= set(pieces)
    assert units_of(network)[0].name == "transformer_blocks.0"


def test_the_second_picture_of_a_prompt_runs_no_modulation_again(flux: Path) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    with danqing.open(flux, device=CPU) as engine:
        for seed in (1, 2, 1):
            engine.generate("a boat", seed=seed, height=64, width=64, num_inference_steps=2)
            network = engine._residence.modules["transformer"]
            if not seen:
                layer = network.transformer_blocks[0].norm1.linear
                forward = layer.forward

                def counted(*args: torch.Tensor, run: object = forward) -> object:
                    seen.append(args)
                    return run(*args)  # type: ignore[operator]

                layer.forward = counted
                seen.append(())
        assert len(seen) == 1


# --- files that change ---------------------------------------------------------------------------


@pytest.fixture
def streamed(tmp_path: Path) -> Path:
    return toys.write_diffusers(tmp_path / "flux")


def transformer_of(folder: Path) -> Path:
    return next((folder / "transformer").glob("*.safetensors"))


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"other numbers")


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


@pytest.mark.parametrize("harm", [cut, write_into], ids=lambda harm: harm.__name__)
def test_a_file_changed_while_it_is_streamed_is_an_error(streamed: Path, harm: object) -> None:
    def between_steps(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.done == 1:
            harm(transformer_of(streamed))  # type: ignore[operator]

    opened = danqing.open(streamed, device=CPU, placement="streamed")
    with opened as engine, pytest.raises(CheckpointDamagedError, match="while it was"):
        engine.generate("a boat", seed=1, num_inference_steps=4, listen=between_steps)


def test_a_file_replaced_while_it_is_streamed_changes_nothing(streamed: Path) -> None:
    def between_steps(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.done == 1:
            replace(transformer_of(streamed))

    expected = paint(streamed, placement="resident")[0].pixels_sha256
    with danqing.open(streamed, device=CPU, placement="streamed") as engine:
        request = Request(prompt="a boat", seed=3, height=64, width=96, num_inference_steps=3)
        found = engine.generate(request, listen=between_steps).pictures[0].pixels_sha256
    assert found == expected


def test_a_file_replaced_between_header_and_weights_is_an_error(streamed: Path) -> None:
    with danqing.open(streamed, device=CPU, placement="streamed") as engine:
        replace(transformer_of(streamed))
        with pytest.raises(CheckpointDamagedError):
            engine.generate("a boat", seed=1)


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_ranges_are_read_as_they_lie(tmp_path: Path, direct: bool) -> None:
    file = tmp_path / "file"
    data = os.urandom(40 * BLOCK + 17)
    file.write_bytes(data)
    identity = Identity.of(file.stat())
    places = [(5, 100), (3 * BLOCK + 7, 9 * BLOCK), (0, 3), (len(data) - 9, len(data)), (77, 78)]
    layout = lay_out([Span(file, identity, *place) for place in places])
    memory = devices.select(CPU).device.staging(layout.size)
    reader = RangeReader(direct=direct)
    reader.start(layout, as_memory(memory)).wait()
    reader.close()
    for (start, stop), place in zip(places, layout.places, strict=True):
        assert bytes(memory[place : place + stop - start].tolist()) == data[start:stop]
    assert all(place % BLOCK == 0 for _, place in layout.reads)


def test_a_file_system_without_direct_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may refuse to open a file so, or to read from it."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3 * BLOCK))
    span = Span(file, Identity.of(file.stat()), 0, 3 * BLOCK)
    real_open, real_read = os.open, os.preadv
    opened: set[int] = set()

    def open_direct(path: object, flags: int, *rest: object) -> int:
        number = real_open(path, flags & ~os.O_DIRECT, *rest)  # type: ignore[arg-type]
        if flags & os.O_DIRECT:
            opened.add(number)
        return number

    def read(number: int, *rest: object) -> int:
        if number in opened:
            raise OSError(22, "Invalid argument")
        return real_read(number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", open_direct)
    monkeypatch.setattr(os, "preadv", read)
    layout = lay_out([span])
    memory = devices.select(CPU).device.staging(layout.size)
    reader = RangeReader(direct=True)
    reader.start(layout, as_memory(memory)).wait()
    reader.close()
    assert bytes(memory[: 3 * BLOCK].tolist()) == file.read_bytes()
    assert opened


def test_the_ring_gives_no_byte_twice() -> None:
    ring = Ring(10 * BLOCK, devices.select(CPU).device)
    live: list[tuple[int, int]] = []
    generator = torch.Generator().manual_seed(0)
    for size in torch.randint(1, 7, (500,), generator=generator).tolist():
        while (start := ring.take(size * BLOCK)) is None:
            ring.give_back()
            live.pop(0)
        here = (start, start + size * BLOCK)
        assert here[1] <= len(ring)
        assert all(here[1] <= first or last <= here[0] for first, last in live)
        live.append(here)


# --- the plan ------------------------------------------------------------------------------------


def test_a_limit_too_small_says_what_would_do(flux: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"--memory \d+\.\dGiB would do"):
        danqing.open(flux, device=CPU, memory=100 << 20)


def test_what_is_compiled_cannot_be_streamed(flux: Path) -> None:
    with pytest.raises(danqing.errors.KernelError, match="cannot be compiled"):
        danqing.open(flux, device=CPU, placement="streamed", compile_with="inductor")


def test_no_such_placement(flux: Path) -> None:
    with pytest.raises(RequestError, match="resident, staged, streamed"):
        danqing.open(flux, device=CPU, placement="cloud")


# --- int8 ----------------------------------------------------------------------------------------


def test_int8_is_alike_and_streams_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from danqing.devices import cpu
    from danqing.processor import cpu_flags
    from danqing.verify.metrics import compare

    # oneDNN computes bytes on any CPU; danqing takes it where the processor has them
    monkeypatch.setattr(cpu, "_INT8_FLAGS", cpu_flags())
    found = {}
    for quantise in ("off", "int8"):
        with danqing.open("pocket", device=CPU, quantise=quantise) as engine:
            two = engine.generate("three blue mountains", seed=1, num_images_per_prompt=2)
            found[quantise] = two.pictures[0].image
            if engine._residence.streaming is not None:
                streamed = engine._residence.streaming.streamed["transformer"]
                sizes = {u.name: b for u, b in engine._model.units("transformer")}
                assert streamed.read_bytes == sum(sizes.values())
                assert two.pictures[0].provenance.device["quantised"] == {"transformer": "int8"}
    difference = compare(found["off"], found["int8"])
    assert difference.psnr > 30
    assert difference["ssim"] > 0.9
    assert difference.largest > 0


def test_int8_is_the_same_whatever_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are quantised anew in each step give what those give that stay quantised."""
    from danqing.devices import cpu
    from danqing.processor import cpu_flags

    monkeypatch.setattr(cpu, "_INT8_FLAGS", cpu_flags())
    found = {}
    for placement in ("auto", "streamed"):
        with danqing.open("pocket", device=CPU, quantise="int8", placement=placement) as engine:
            found[placement] = (
                engine.generate("three blue mountains", seed=1).pictures[0].pixels_sha256
            )
            (part,) = (p for p in engine.plan.components if p.name == "transformer")
            assert bool(part.staying) == (placement == "auto")
            transformer = engine._residence.modules.get("transformer")
            if transformer is not None and placement == "streamed":
                layers = [one for one in transformer.modules() if "forward" in vars(one)]
                assert not any(type(one) is torch.nn.Linear for one in layers)
    assert found["auto"] == found["streamed"]


@pytest.mark.parametrize("placement", ["staged", "streamed"])
def test_a_stage_is_gone_when_the_next_is_read(
    flux: Path, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even layers whose methods were exchanged, and the memory they were read into."""
    import gc

    from danqing.engine.residence import Residence

    seen: list[str] = []
    gone: list[tuple[str, Any]] = []
    build = Residence.build

    def watched(residence: Residence, name: str, listen: Any) -> Any:
        if name == "vae":
            assert [path for path, one in gone if one() is not None] == []
            assert residence.streaming is None
        found = build(residence, name, listen)
        if name != "vae":
            seen.append(name)
            layers = found.named_modules(prefix=name)
            gone.extend((path, weakref.ref(layer)) for path, layer in layers)
            if residence.streaming is not None:
                gone.append(("the ring", weakref.ref(residence.streaming.ring)))
        return found

    monkeypatch.setattr(Residence, "build", watched)
    gc.disable()
    try:
        with danqing.open(flux, device=CPU, dtype="bfloat16", placement=placement) as engine:
            engine.generate("a cat", height=64, width=64, num_inference_steps=1)
    finally:
        gc.enable()
    assert seen == ["text_encoder", "text_encoder_2", "transformer"]


@pytest.mark.parametrize("which", ["flux", "deepgen"])
def test_the_second_picture_of_a_prompt_reads_blocks_alone(
    which: str, request: pytest.FixtureRequest
) -> None:
    """Not the layers that see the step alone: what they gave outlives the transformer."""
    with danqing.open(request.getfixturevalue(which), device=CPU, placement="streamed") as engine:
        units = engine._model.units("transformer")
        once = {unit.name for unit, _ in units if unit.once}
        pictures = []
        transformers = watch_reads(engine)
        for seed in (1, 2, 1):
            found = engine.generate("a boat", seed=seed, height=64, width=64, num_inference_steps=2)
            pictures.append(found.pictures[0].pixels_sha256)
            reads = transformers[-1].reads
            assert len(transformers) == len(pictures)
            assert once & reads.keys() == (once if len(pictures) == 1 else set())
            # nothing is read in vain: what is needed once one time, blocks once for each step
            assert reads.keys() >= {unit.name for unit, _ in units if not unit.once}
            assert set(reads.values()) <= {1, 2}
            assert {name for name, count in reads.items() if count == 1} <= once
        assert pictures[0] == pictures[2] != pictures[1]


def _as_int8(flux: Path, place: Path) -> dict[str, object]:
    from danqing.models.convert import convert

    convert(
        open_checkpoint(flux), place / "int8", layout="diffusers", dtype="int8",
        on_bytes=lambda *_: None,
    )  # fmt: skip
    return {"place": place / "int8"}


def watch_reads(engine: danqing.Engine, component: str = "transformer") -> list[Streamed]:
    """Return a list that gets a component's `Streamed` each time the component is loaded."""
    found: list[Streamed] = []

    def on_load(name: str, module: torch.nn.Module) -> None:
        streamed = streamed_part(module)
        if name == component and streamed is not None:
            found.append(streamed)

    engine._residence.on_load = on_load
    return found


@pytest.mark.parametrize("write", [_as_int8, _as_gguf, _as_scaled_fp8], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stay", ["all", "some"])
def test_fewer_bits_stay_as_they_lie(
    write: Callable[[Path, Path], dict[str, Any]],
    stay: str,
    flux: Path,
    tmp_path: Path,
) -> None:
    """They are widened for each step, and read from the files once."""
    opening = write(flux, tmp_path)
    resident = paint(**opening, dtype="bfloat16", count=2)[0].pixels_sha256
    request = Request(prompt="a boat", seed=3, height=64, width=96, num_inference_steps=3)
    place = opening.pop("place")
    with danqing.open(
        place, device=CPU, dtype="bfloat16", placement="streamed", **opening
    ) as opened:
        blocks = [unit.name for unit, _ in opened._model.units("transformer") if not unit.once]
        names = tuple(blocks if stay == "all" else blocks[::2])
        components = tuple(
            dataclasses.replace(part, staying=names, compact=True)
            if part.name == "transformer"
            else part
            for part in opened.plan.components
        )
    with replanned(opened, kept=("transformer",), components=components) as engine:
        sizes = {unit.name: size for unit, size in engine._model.units("transformer")}
        found = engine.generate(request).pictures[0]
        assert engine._residence.streaming is not None
        streamed = engine._residence.streaming.streamed["transformer"]
        assert streamed.settled == set(names)
        passes = {name: 1 if name in names or name not in blocks else 3 for name in sizes}
        assert streamed.read_bytes == sum(sizes[name] * passes[name] for name in sizes)
        assert {streamed.reads[name] for name in names} == {1}
        again = engine.generate(request).pictures[0]
        assert streamed.settled == set(names)
        assert {streamed.reads[name] for name in names} == {1}
    assert found.pixels_sha256 == again.pixels_sha256 == resident


def test_bytes_on_disk_are_the_bytes_that_compute(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights stored in int8 are not quantised a second time."""
    from danqing.devices import cpu
    from danqing.devices.native import int8
    from danqing.processor import cpu_flags

    monkeypatch.setattr(cpu, "_INT8_FLAGS", cpu_flags())
    given = []
    make = int8.Int8Linear.__init__

    def watched(layer: Any, weight: Any, bias: Any, scales: Any = None) -> None:
        given.append((weight.dtype, scales is not None))
        make(layer, weight, bias, scales)

    monkeypatch.setattr(int8.Int8Linear, "__init__", watched)
    opening = _as_int8(flux, tmp_path)
    digests = []
    for placement in ("auto", "streamed"):
        given.clear()
        found = paint(**opening, dtype="bfloat16", quantise="int8", placement=placement)  # type: ignore[arg-type]
        digests.append(found[0].pixels_sha256)
        assert set(given[1:]) == {(torch.int8, True)}  # the first asks whether it can
    assert digests[0] == digests[1]


@pytest.mark.parametrize("which", ["flux", "deepgen"])
def test_what_is_left_of_a_streamed_network_stays_where_there_is_room(
    which: str, request: pytest.FixtureRequest
) -> None:
    """And from the second run on the next picture's first blocks are there before it begins."""
    asked: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
    seeds = (1, 2, 1)
    folder = request.getfixturevalue(which)
    with danqing.open(folder, device=CPU, placement="streamed") as engine:
        expected = [engine.generate("a boat", seed=s, **asked).pictures[0] for s in seeds]
        assert not engine._residence.modules
    with replanned(engine, kept=("transformer", "vae")) as engine:
        for number, seen in enumerate(expected):
            found = engine.generate("a boat", seed=seeds[number], **asked).pictures[0]
            assert found.pixels_sha256 == seen.pixels_sha256
            loaded = [cost.component for cost in found.stages if cost.name == "load"]
            assert ("transformer" in loaded) == (number == 0)
            assert engine._residence.streaming is not None
            streamed = engine._residence.streaming.streamed["transformer"]
            units = (unit for unit, _ in engine._model.units("transformer"))
            first = next(unit.name for unit in units if not unit.once)
            assert streamed.pending[:1] == ([first] if number else [])
        other = engine.generate("a horse", seed=1, **asked).pictures[0]
        assert other.pixels_sha256 != expected[0].pixels_sha256


def test_a_streamed_network_is_kept_if_it_fits_beside_the_others() -> None:
    size = 100 << 20
    blocks = tuple(
        Block(name=f"b.{i}", disk=size, bytes=size, wide=0, stays=size, once=False)
        for i in range(20)
    )
    parts = {
        "text_encoder": Part(name="text_encoder", disk=1 << 20, bytes=1 << 20),
        "transformer": Part(name="transformer", disk=2100 << 20, bytes=2100 << 20, blocks=blocks),
        "vae": Part(name="vae", disk=50 << 20, bytes=50 << 20),
    }
    work = Work(
        stages={name: (part,) for name, part in zip(_STAGES, parts, strict=True)},
        activations=dict.fromkeys(_STAGES, 10 << 20), flops=dict.fromkeys(_STAGES, 1e9),
        steps=4, base=0,
    )  # fmt: skip
    for limit, kept in ((1024, ("transformer", "vae")), (430, ())):
        found = next(
            one
            for one in streamings(parts, work, limit << 20, None, all_of_it=False)
            if one.peak <= limit << 20
        )
        assert found.kept == kept


_STAGES = ("encode", "denoise", "decode")


def replanned(engine: danqing.Engine, **changes: Any) -> danqing.Engine:
    """Return an engine of the same parts, with some of the plan's decisions changed."""
    plan = dataclasses.replace(engine.plan, **changes)
    return danqing.Engine(engine._model, engine.device, plan, places={}, options=engine.options)


@pytest.mark.parametrize("placement", ["resident", "streamed"])
@pytest.mark.parametrize("name", ["norm_out.linear", "transformer_blocks.1.norm1.linear"])
def test_after_a_modulating_layer_failed_the_next_picture_is_sound(
    name: str, placement: str, flux: Path
) -> None:
    asked: dict[str, Any] = {"seed": 1, "height": 64, "width": 64, "num_inference_steps": 2}
    expected = paint_one(flux, asked)
    with danqing.open(flux, device=CPU, placement=placement) as opened:
        pass
    with replanned(opened, kept=("transformer", "vae")) as engine:
        engine.load()
        transformer = (
            engine._residence.modules.get("transformer")
            or engine._residence.load(["transformer"], [], None)["transformer"]
        )

        def fail(*_: Any) -> None:
            message = "no such luck"
            raise ValueError(message)

        hook = transformer.get_submodule(name).register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="no such luck"):
            engine.generate("a boat", **asked)
        hook.remove()
        assert engine.generate("a boat", **asked).pictures[0].pixels_sha256 == expected


def paint_one(place: Path, asked: dict[str, Any]) -> str:
    with danqing.open(place, device=CPU) as engine:
        return engine.generate("a boat", **asked).pictures[0].pixels_sha256


def test_no_int8_where_the_device_has_none(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from danqing.devices import cpu

    monkeypatch.setattr(cpu, "cpu_flags", frozenset)
    with pytest.raises(danqing.errors.KernelError, match="no arithmetic in int8"):
        danqing.open(flux, device=CPU, quantise="int8")
    with pytest.raises(RequestError, match="off, int8"):
        danqing.open(flux, device=CPU, quantise="int4")
