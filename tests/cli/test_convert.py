"""`danqing convert`: every layout into every other, bit for bit; peak memory of one tensor."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

import danqing
from danqing import models
from tests import layouts, sparse, toys
from tests.conftest import call_danqing

if TYPE_CHECKING:
    from pathlib import Path


def convert(source: Path, target: Path, *options: str) -> Path:
    child = call_danqing("convert", source, target, *options)
    assert child.returncode == 0, child.stderr
    return target


def networks(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for file in (folder / name).glob("*.safetensors"):
            for key, tensor in load_file(file).items():
                found[f"{name}/{key.removeprefix('text_model.')}"] = tensor
    return {key: value for key, value in found.items() if "embed_tokens" not in key}


def paint(place: Path) -> bytes:
    with danqing.open(place, device="cpu") as engine:
        return engine.generate("a cat", seed=3, height=64, width=64).image.tobytes()


@pytest.mark.parametrize("layout", ["bfl", "comfy", "diffusers"])
@pytest.mark.parametrize("kind", ["schnell", pytest.param("dev", marks=pytest.mark.slow)])
def test_there_and_back_is_the_same_bits(
    kind: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(kind)
    there = convert(source, tmp_path / "there", "--layout", layout)
    back = convert(there, tmp_path / "back", "--layout", "diffusers")
    mine, theirs = networks(back), networks(source)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert paint(there) == paint(back) == paint(source)


def test_the_bfl_files_are_the_hand_written_ones(
    schnell: Path, schnell_bfl: Path, tmp_path: Path
) -> None:
    there = convert(schnell, tmp_path / "there", "--layout", "bfl")
    for mine, theirs in (
        ("flux1-schnell.safetensors", "flux1-toy.safetensors"),
        ("ae.safetensors", "ae.safetensors"),
    ):
        one, other = load_file(there / mine), load_file(schnell_bfl / theirs)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_diffusers_opens_what_was_a_comfy_file(schnell: Path, tmp_path: Path) -> None:
    """The reference pipeline paints the same from a folder that went through ComfyUI's layout."""
    there = convert(schnell, tmp_path / "there", "--layout", "comfy")
    back = convert(there, tmp_path / "back", "--layout", "diffusers")
    pictures = []
    for folder in (schnell, back):
        pipe = toys.open_with_diffusers(folder)
        pictures.append(
            pipe(
                "a cat", height=64, width=64, num_inference_steps=2, max_sequence_length=256,
                generator=torch.Generator().manual_seed(0), output_type="np",
            ).images
        )  # fmt: skip
    assert (pictures[0] == pictures[1]).all()


def test_quantised_weights_become_plain_ones(schnell: Path, tmp_path: Path) -> None:
    parts = layouts.states(schnell)
    small = layouts.write_tokenizers(tmp_path / "small")
    folder = tmp_path / "gguf"
    folder.mkdir()
    wide = layouts.write_gguf(folder / "x.gguf", "flux", parts["transformer"], "Q8_0")
    for name in ("vae", "text_encoder", "text_encoder_2"):
        layouts.save(folder / f"{name}.safetensors", parts[name])
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(small[name], folder / name)
    refused = call_danqing("convert", folder, tmp_path / "out", "--layout", "bfl")
    assert refused.returncode == 2
    assert "quantised" in refused.stderr
    assert not (tmp_path / "out").exists()
    there = convert(folder, tmp_path / "out", "--layout", "bfl", "--dtype", "float32")
    found = load_file(there / "flux1-schnell.safetensors")
    assert all(torch.equal(found[name], wide[name]) for name in wide)


@pytest.mark.parametrize("layout", ["comfy", "diffusers", "bfl"])
def test_int8_keeps_a_byte_of_each_weight_and_the_picture(
    schnell: Path, tmp_path: Path, layout: str
) -> None:
    """Blocks in int8, by row: half the size, no weight off by more than half a step."""
    there = convert(schnell, tmp_path / "there", "--layout", layout, "--dtype", "int8")
    files = [load_file(path) for path in there.rglob("*.safetensors")]
    whole = {key: value for file in files for key, value in file.items()}
    scaled = [key for key, value in whole.items() if value.dtype is torch.int8]
    assert scaled
    for key in scaled:
        scale = whole[f"{key.removesuffix('weight')}weight_scale"]
        assert scale.shape == (len(whole[key]), 1)
        assert (whole[key].abs().amax(1) == 127).all()
    wide = convert(there, tmp_path / "wide", "--layout", "diffusers", "--dtype", "float32")
    mine, theirs = networks(wide), networks(schnell)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        error = (mine[name] - tensor.float()).abs()
        inside = any(part.isdigit() for part in name.split(".")) and not name.startswith("vae/")
        if tensor.ndim == 2 and inside:
            assert (error <= tensor.float().abs().amax(1, keepdim=True) / 250).all(), name
        else:
            assert (error <= tensor.float().abs() * 2**-8).all(), name
    pictures = []
    for placement in ("resident", "streamed"):
        with danqing.open(there, device="cpu", dtype="bfloat16", placement=placement) as engine:
            found = engine.generate("a cat", seed=3, height=64, width=64)
            pictures.append(found.pictures[0].pixels_sha256)
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--layout", "onnx"], "diffusers, bfl, comfy", 2),
        (["--dtype", "int4"], "keep, float32", 2),
    ],
)
def test_what_cannot_be(
    schnell: Path, tmp_path: Path, options: list[str], words: str, code: int
) -> None:
    child = call_danqing("convert", schnell, tmp_path / "x", *options)
    assert child.returncode == code
    assert words in child.stderr
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_left_alone(schnell: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    child = call_danqing("convert", schnell, tmp_path / "mine")
    assert child.returncode == 7
    assert (tmp_path / "mine").read_text() == "precious"


def test_real_sizes_are_announced_and_refused_for_space(tmp_path: Path) -> None:
    """34 GB of sparse files: the plan is made from headers, and says so when the disk is small."""
    folder = sparse.write_real_size(tmp_path / "real", guided=False)
    toys.write_clip_tokenizer(folder / "clip")
    toys.write_t5_tokenizer(folder / "t5")
    checkpoint = models.open_checkpoint(folder)
    assert sum(part.size_bytes for part in checkpoint.components.values()) > 33e9


def test_a_family_that_says_nothing_of_layouts_writes_the_folder_alone(
    schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family written after docs/adding/model.md need not have a module `writing`."""
    from danqing.errors import RequestError
    from danqing.models.convert import convert as write

    monkeypatch.setitem(models.FAMILIES, "flux1", "tests.models.plain_family")
    checkpoint = models.open_checkpoint(schnell)
    with pytest.raises(RequestError, match=r"cannot write FLUX\.1-schnell in this") as caught:
        write(checkpoint, tmp_path / "out", layout="bfl", dtype="keep", on_bytes=lambda *_: None)
    assert caught.value.allowed == "diffusers"
    there = tmp_path / "there"
    write(checkpoint, there, layout="diffusers", dtype="keep", on_bytes=lambda *_: None)
    assert networks(there).keys() == networks(schnell).keys()
    assert paint(there) == paint(schnell)
