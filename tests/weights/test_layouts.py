"""Where components are found: side by side, in mixed downloads, and by name."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch

import danqing
from danqing import models
from danqing.errors import CheckpointError, UnsafeFileError
from tests import toys

if TYPE_CHECKING:
    from pathlib import Path


def paint(place: Path, **components: Path) -> bytes:
    with danqing.open(place, device="cpu", components=components) as engine:
        return engine.generate("a cat", seed=1, height=64, width=64).image.tobytes()


@pytest.fixture(scope="module")
def expected(schnell: Path) -> bytes:
    return paint(schnell)


@pytest.fixture
def both(schnell: Path, schnell_bfl: Path, tmp_path: Path) -> Path:
    """The whole repository of the release: the diffusers folder with the BFL files in it."""
    folder = tmp_path / "repository"
    shutil.copytree(schnell, folder)
    shutil.copy(schnell_bfl / "flux1-toy.safetensors", folder)
    shutil.copy(schnell_bfl / "ae.safetensors", folder)
    return folder


def test_a_repository_with_both_layouts(both: Path, expected: bytes) -> None:
    assert models.open_checkpoint(both).layout == "diffusers folder"
    file = both / "flux1-toy.safetensors"
    opened = models.open_checkpoint(file)
    assert opened.layout == "BFL files"
    assert opened.components["vae"].files == (both / "ae.safetensors",)
    assert paint(both) == paint(file) == expected


def test_a_download_without_the_transformer_folder(both: Path, expected: bytes) -> None:
    shutil.rmtree(both / "transformer")
    assert models.open_checkpoint(both).layout == "BFL files"
    assert paint(both) == expected


def test_a_folder_saved_by_the_pipeline_itself(
    schnell: Path, tmp_path: Path, expected: bytes
) -> None:
    """Its tokenizers are rewritten by whatever transformers is installed."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(schnell, local_files_only=True)
    pipe.save_pretrained(tmp_path / "saved")
    assert paint(tmp_path / "saved") == expected


def test_the_index_file_stands_for_its_folder(schnell: Path, expected: bytes) -> None:
    assert paint(schnell / "model_index.json") == expected


def test_shards(tmp_path: Path, expected: bytes) -> None:
    folder = toys.write_diffusers(tmp_path / "shards", max_shard_size="300KB")
    assert len(models.open_checkpoint(folder).components["transformer"].files) > 3
    assert paint(folder) == expected
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert paint(folder) == expected  # a complete set of shards needs no index


def test_a_variant_is_taken_when_it_is_all_there_is(
    schnell: Path, tmp_path: Path, expected: bytes
) -> None:
    folder = tmp_path / "variant"
    shutil.copytree(schnell, folder)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp32.safetensors"))
    assert paint(folder) == expected


def test_sft_is_safetensors(schnell_bfl: Path, tmp_path: Path, expected: bytes) -> None:
    folder = tmp_path / "sft"
    shutil.copytree(schnell_bfl, folder)
    (folder / "flux1-toy.safetensors").rename(folder / "anything.sft")
    (folder / "ae.safetensors").rename(folder / "something-else.safetensors")
    assert paint(folder) == expected


def test_names_of_folders_mean_nothing(schnell: Path, dev: Path, tmp_path: Path) -> None:
    (tmp_path / "FLUX.1-dev").symlink_to(schnell)
    (tmp_path / "FLUX.1-schnell").symlink_to(dev)
    with danqing.open(tmp_path / "FLUX.1-dev", device="cpu") as engine:
        assert engine.spec.kind == "schnell"
    with danqing.open(tmp_path / "FLUX.1-schnell", device="cpu") as engine:
        assert engine.spec.kind == "dev"


def test_two_of_a_kind_are_settled_by_name(
    schnell_bfl: Path, tmp_path: Path, expected: bytes
) -> None:
    folder = tmp_path / "two"
    shutil.copytree(schnell_bfl, folder)
    shutil.copytree(folder / "t5-v1_1-toy", folder / "another-t5")
    with pytest.raises(CheckpointError, match="more than one text_encoder_2"):
        models.open_checkpoint(folder)
    assert paint(folder, t5=folder / "another-t5") == expected


def test_encoders_that_are_pickles_are_named(
    schnell_bfl: Path, tmp_path: Path, expected: bytes
) -> None:
    """As google/t5-v1_1-xxl is: 44.5 GB of pytorch_model.bin."""
    folder = tmp_path / "pickled"
    shutil.copytree(schnell_bfl, folder)
    (folder / "t5-v1_1-toy" / "model.safetensors").unlink()
    torch.save({}, folder / "t5-v1_1-toy" / "pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match="text_encoder_2 is there only as a Python pickle"):
        models.open_checkpoint(folder)
    # with another T5 named, the folder's is not looked at
    assert paint(folder, t5=schnell_bfl / "t5-v1_1-toy") == expected


def test_whole_models_serve_as_encoders(schnell: Path, tmp_path: Path, expected: bytes) -> None:
    """openai/clip-vit-large-patch14 has a vision half, a whole T5 a decoder: both are left out."""
    from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

    networks = toys.make_networks()
    clip = CLIPModel(
        CLIPConfig(
            text_config=toys.CLIP,
            vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                           "intermediate_size": 32, "image_size": 32, "patch_size": 16},
            projection_dim=32,
        )
    )  # fmt: skip
    text = {
        k.removeprefix("text_model."): v for k, v in networks["text_encoder"].state_dict().items()
    }
    clip.text_model.load_state_dict(text)
    clip.save_pretrained(tmp_path / "clip")
    shutil.copytree(schnell / "tokenizer", tmp_path / "clip", dirs_exist_ok=True)
    t5 = T5ForConditionalGeneration(T5Config(**{**toys.T5, "tie_word_embeddings": True}))
    state = networks["text_encoder_2"].state_dict()
    t5.load_state_dict(state, strict=False)
    t5.save_pretrained(tmp_path / "t5")
    shutil.copytree(schnell / "tokenizer_2", tmp_path / "t5", dirs_exist_ok=True)
    assert paint(schnell, clip=tmp_path / "clip", t5=tmp_path / "t5") == expected


def test_a_tied_embedding_under_its_other_name(
    schnell: Path, tmp_path: Path, expected: bytes
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "tied"
    shutil.copytree(schnell, folder)
    file = folder / "text_encoder_2" / "model.safetensors"
    state = load_file(file)
    shared = state.pop("shared.weight")
    save_file({**state, "encoder.embed_tokens.weight": shared.clone()}, file)
    assert paint(folder) == expected
    save_file(
        {**state, "encoder.embed_tokens.weight": shared.clone(), "shared.weight": shared}, file
    )
    assert paint(folder) == expected


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip_with_and_without_prefix(
    prefix: str, schnell: Path, tmp_path: Path, expected: bytes
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    shutil.copytree(schnell, folder)
    file = folder / "text_encoder" / "model.safetensors"
    state = {
        prefix + name.removeprefix("text_model."): value for name, value in load_file(file).items()
    }
    save_file({**state, f"{prefix}embeddings.position_ids": torch.arange(77)[None]}, file)
    assert paint(folder) == expected


def test_fingerprints_tell_weights_apart(schnell: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(schnell, folder)
    assert models.open_checkpoint(folder).fingerprint == models.open_checkpoint(schnell).fingerprint
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    other = toys.write_diffusers(tmp_path / "seed", seed=2)
    assert models.open_checkpoint(other).fingerprint != models.open_checkpoint(schnell).fingerprint
