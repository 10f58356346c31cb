"""What every family must do, whatever its networks: one suite over every row of `families.ROWS`.

The toys are written by other people's writers, the images compared with other people's pipelines.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import danqing
from danqing import models
from danqing.devices.cpu import Cpu
from danqing.errors import NoEffectError
from danqing.models.convert import convert, layouts_of
from danqing.request import Request
from danqing.verify.metrics import compare
from tests.models.families import ROWS, FamilyRow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from PIL.Image import Image

    from danqing.arrays import Array
    from danqing.generation import Progress
    from danqing.models.slots import Slot

STEPS = 3
SEED = 7
REQUEST = Request(
    prompt="a small red boat, naïve, 丹青",
    height=64,
    width=96,
    num_inference_steps=STEPS,
    seed=SEED,
)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A row's toy on disk, and its image in float32, resident."""

    row: FamilyRow
    folder: Path
    engine: danqing.Engine
    image: Image

    def open(self, **options: Any) -> danqing.Engine:
        """Open the toy on the CPU."""
        return danqing.open(self.folder, device="cpu", **options)

    @property
    def spec(self) -> Any:
        """What the model takes."""
        return models.identify(models.open_checkpoint(self.folder))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Its components."""
        return models.slots_of(self.spec)

    def components(self, role: str) -> set[str]:
        """Return the names of the components with a role."""
        return {slot.name for slot in self.slots if slot.role == role}


@pytest.fixture(scope="session", params=ROWS, ids=lambda row: row.name)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    row: FamilyRow = request.param
    folder = row.toy(tmp_path_factory.mktemp("contract") / row.name)
    with danqing.open(folder, device="cpu", dtype="float32", placement="resident") as engine:
        image = engine.generate(REQUEST).image
        yield Toy(row=row, folder=folder, engine=engine, image=image)


def noise_of(toy: Toy, seed: int) -> torch.Tensor:
    """Draw the noise with torch alone."""
    return torch.randn(toy.row.noise, generator=torch.Generator().manual_seed(seed))


def same(image: Image, other: Image) -> bool:
    return image.tobytes() == other.tobytes()


def test_every_family_has_a_row() -> None:
    assert {row.family for row in ROWS} == models.FAMILIES.keys()
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_family_is_recognised(toy: Toy) -> None:
    assert toy.spec.family == toy.row.family


def test_every_role_is_filled(toy: Toy) -> None:
    for role in ("denoiser", "decoder", "text encoder", "tokenizer", "schedule"):
        assert toy.components(role), role


# --- images --------------------------------------------------------------------------------------


def test_float32_equals_the_foreign_implementation(toy: Toy) -> None:
    request = toy.spec.resolve(REQUEST)
    expected = toy.row.reference(toy.folder, request, noise_of(toy, SEED))
    away = np.abs(np.asarray(toy.image, int) - expected)
    assert away.max() <= toy.row.levels
    assert expected.std() > 5


def test_prompts_and_seeds_change_the_image(toy: Toy) -> None:
    images = {
        toy.engine.generate(REQUEST, prompt=prompt, seed=seed).image.tobytes()
        for prompt in (REQUEST.prompt, "a dog")
        for seed in (SEED, 8)
    }
    assert len(images) == 4
    assert toy.image.tobytes() in images


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_placements_have_the_same_bits(toy: Toy, dtype: str) -> None:
    digests, images = [], []
    for placement in ("resident", "staged", "streamed"):
        with toy.open(dtype=dtype, placement=placement) as engine:
            assert engine.plan.placement == placement
            pictures = engine.generate(REQUEST, num_images_per_prompt=2).pictures
        digests.append([picture.pixels_sha256 for picture in pictures])
        images.append(pictures[0].image)
    assert digests[0] == digests[1] == digests[2]
    assert digests[0][0] != digests[0][1]
    if dtype == "float32":
        assert same(images[0], toy.image)
    else:
        assert 0 < compare(images[0], toy.image)["mean"] < 4


def test_a_batch_is_close_to_single_images(toy: Toy) -> None:
    single = toy.engine.generate(REQUEST, num_images_per_prompt=3).pictures
    together = toy.engine.generate(REQUEST, num_images_per_prompt=3, batch=2).pictures
    assert [picture.request.seed for picture in together] == [7, 8, 9]
    for one, other in zip(single, together, strict=True):
        assert one.provenance.noise_sha256 == other.provenance.noise_sha256
        assert compare(other.image, one.image).largest <= 1
    assert [picture.provenance.batch["size"] for picture in together] == [2, 2, 1]
    assert same(single[0].image, toy.image)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_noise_depends_on_the_seed_alone(toy: Toy, dtype: str) -> None:
    """Not on the dtype, the batch, the prompt, or the weights."""
    request = REQUEST.replace(
        prompt=f"in {dtype}", seed=6, num_images_per_prompt=3, num_inference_steps=1
    )
    with toy.open(dtype=dtype) as engine:
        pictures = engine.generate(request, batch=3).pictures
    for number, picture in enumerate(pictures):
        digest = hashlib.sha256(noise_of(toy, 6 + number).numpy().tobytes()).hexdigest()
        assert picture.provenance.noise_sha256 == digest


# --- what a run shows, and how it ends -----------------------------------------------------------


class Enough(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_a_listener_can_cancel(toy: Toy, placement: str) -> None:
    def stop(report: Progress) -> None:
        if report.stage == "denoise" and report.done == 2:
            raise Enough

    heard: list[Progress] = []
    with toy.open(placement=placement) as engine:
        with pytest.raises(Enough):
            engine.generate(REQUEST, listen=stop)
        assert same(engine.generate(REQUEST, listen=heard.append).image, toy.image)
    assert [report.done for report in heard if report.stage == "denoise"] == [1, 2, 3]


def test_a_probe_sees_every_joint(toy: Toy) -> None:
    arrays: dict[str, Array] = {}
    picture = toy.engine.probe(REQUEST, lambda name, array: arrays.update({name: array}))
    assert same(picture.image, toy.image)
    denoised = [
        f"denoise/{n:04}/{what}" for n in range(1, STEPS + 1) for what in ("velocity", "latents")
    ]
    encoded = [name for name in arrays if name.startswith("encode/")]
    drawn = [name for name in arrays if name.startswith("draw/")]
    assert encoded
    assert drawn[0] == "draw/0"
    assert list(arrays) == [*encoded, *drawn, *denoised, "decode/pixels"]
    assert np.array_equal(arrays["draw/0"].values(), noise_of(toy, SEED).numpy())
    pixels = arrays["decode/pixels"].values()[0].astype(np.float32)
    levels = ((pixels / 2 + 0.5).clip(0, 1) * 255).round()
    assert np.array_equal(levels.transpose(1, 2, 0), np.asarray(toy.image))


def replace(arrays: Mapping[str, Array], start: str, name: str, _: Array) -> Array | None:
    """Put another run's tensors in the place of those whose names begin so."""
    return arrays[name] if name.startswith(start) else None


def test_a_probe_can_replace_every_joint(toy: Toy) -> None:
    """Each joint of another seed's run, put into this one, gives the other seed's image."""
    arrays: dict[str, Array] = {}
    expected = toy.engine.probe(
        REQUEST.replace(seed=8), lambda name, array: arrays.update({name: array})
    )
    for joint in ("draw/0", f"denoise/{STEPS:04}/latents", "decode/pixels"):
        picture = toy.engine.probe(REQUEST, partial(replace, arrays, joint))
        assert same(picture.image, expected.image), joint
    words = REQUEST.replace(prompt="a dog")
    toy.engine.probe(words, lambda name, array: arrays.update({name: array}))
    picture = toy.engine.probe(REQUEST, partial(replace, arrays, "encode/"))
    assert same(picture.image, toy.engine.generate(words).image)


def test_a_probe_sees_the_layers_inside(toy: Toy) -> None:
    (denoiser,) = toy.components("denoiser")
    names: list[str] = []
    toy.engine.probe(
        REQUEST, lambda name, _: names.append(name),
        inside=lambda component, path, call: component == denoiser and call == STEPS,
    )  # fmt: skip
    layers = {name.split("/")[2] for name in names if name.startswith(f"inside/{denoiser}/")}
    assert len(layers) > blocks_of(toy)


# --- options -------------------------------------------------------------------------------------


def blocks_of(toy: Toy) -> int:
    """Return the number of the denoiser's blocks, by the config that diffusers wrote."""
    (denoiser,) = toy.components("denoiser")
    config = json.loads((toy.folder / denoiser / "config.json").read_text("utf-8"))
    return sum(config.get(name, 0) for name in ("num_layers", "num_single_layers"))


def test_every_block_compiles(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own do-nothing compiler, which takes no C++ and keeps the bits."""
    compiled: list[torch.nn.Module] = []
    compile_module = torch.nn.Module.compile

    def spy(module: torch.nn.Module, **options: Any) -> None:
        compiled.append(module)
        compile_module(module, **options)

    monkeypatch.setattr(Cpu, "compiler", lambda *_: "eager")
    monkeypatch.setattr(torch.nn.Module, "compile", spy)
    with toy.open(compile="inductor", placement="resident") as engine:
        picture = engine.generate(REQUEST).pictures[0]
    assert same(picture.image, toy.image)
    assert len({id(module) for module in compiled}) == len(compiled) == blocks_of(toy)
    for cost in picture.stages:
        if cost.name == "denoise":
            assert 0 < cost.compile_seconds < cost.seconds
        else:
            assert cost.compile_seconds == 0
    plain = toy.engine.generate(REQUEST).pictures[0]
    assert all(cost.compile_seconds == 0 for cost in plain.stages)


@pytest.mark.parametrize("placement", ["auto", "streamed"])
def test_int8_comes_close(toy: Toy, placement: str) -> None:
    with toy.open(quantize="int8", placement=placement) as engine:
        image = engine.generate(REQUEST).image
    away = compare(image, toy.image)
    assert away.largest > 0
    assert away.psnr > 25


def test_a_cached_prompt_skips_the_text_encoders(toy: Toy, tmp_path: Path) -> None:
    for known in (False, True):
        with toy.open(prompt_cache=tmp_path / "prompts", placement="staged") as engine:
            picture = engine.generate(REQUEST).pictures[0]
        assert same(picture.image, toy.image)
        read = {cost.component for cost in picture.stages if cost.name == "load"}
        encode = next(cost for cost in picture.stages if cost.name == "encode")
        assert encode.reused == known
        assert read.isdisjoint(toy.components("text encoder")) == known


class Wider(Request):
    """A request with a setting of tomorrow."""

    strength: float | None = None


def test_unknown_settings_are_refused_by_name(toy: Toy) -> None:
    name, value = toy.row.unknown
    with pytest.raises(NoEffectError, match=f"{name} has no effect") as caught:
        toy.engine.generate(REQUEST.replace(**{name: value}))
    assert caught.value.setting == name
    assert str(value) in str(caught.value)
    with pytest.raises(NoEffectError, match="strength has no effect") as caught:
        toy.engine.generate(Wider(**REQUEST.model_dump(exclude_none=True), strength=0.5))
    assert caught.value.setting == "strength"


# --- other layouts -------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{name}": tensor
        for path in folder.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def converted(source: Path, target: Path, layout: str) -> Path:
    checkpoint = models.open_checkpoint(source)
    convert(checkpoint, target, layout=layout, dtype="keep", on_bytes=lambda *_: None)
    return target


def test_layouts_convert_and_back(toy: Toy, tmp_path: Path) -> None:
    """Into each layout that the family writes and back to the first: the same image, the same bits."""
    layouts = layouts_of(toy.spec)
    assert "diffusers" in layouts
    before = tensors_of(toy.folder)
    for layout in layouts:
        there = converted(toy.folder, tmp_path / layout, layout)
        with danqing.open(there, device="cpu") as engine:
            assert same(engine.generate(REQUEST).image, toy.image), layout
        after = tensors_of(converted(there, tmp_path / f"{layout}-back", "diffusers"))
        shared = before.keys() & after.keys()
        assert all(torch.equal(before[name], after[name]) for name in shared), layout
        for name in before.keys() ^ after.keys():  # tied weights, which may be left out
            one, other = (before, after) if name in before else (after, before)
            assert any(torch.equal(one[name], tensor) for tensor in other.values()), (layout, name)
