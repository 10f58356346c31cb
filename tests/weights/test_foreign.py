"""Weights of models danqing does not run are refused by the model's name."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from danqing import models
from danqing.errors import CheckpointError, UnknownModelError
from danqing.weights.kinds import FOREIGN, KINDS, kind_of_classes, recognise
from tests import layouts
from tests.conftest import call_danqing

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [
    pytest.param(kind.title, naming.telltales, id=f"{kind.title}-{number}")
    for kind in KINDS.values()
    for number, naming in enumerate(kind.namings)
    if naming.style == FOREIGN
]
SMALL: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
UNET: dict[str, Any] = {
    "block_out_channels": (32, 32), "cross_attention_dim": 8, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip
XL: dict[str, Any] = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}  # fmt: skip
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Flux2Pipeline": ("FLUX.2", "Flux2Transformer2DModel", {**SMALL, "num_single_layers": 1}),
    "ChromaPipeline": ("Chroma", "ChromaTransformer2DModel", {**SMALL, "num_single_layers": 1}),
    "ZImagePipeline": ("Z-Image", "ZImageTransformer2DModel", {"n_layers": 1}),
    "QwenImagePipeline": ("Qwen-Image", "QwenImageTransformer2DModel", SMALL),
    "StableDiffusionPipeline": ("Stable Diffusion 1 or 2", "UNet2DConditionModel", UNET),
    "StableDiffusionXLPipeline": ("Stable Diffusion XL", "UNet2DConditionModel", UNET | XL),
    "PixArtSigmaPipeline": (
        "PixArt", "PixArtTransformer2DModel",
        {**SMALL, "sample_size": 16, "cross_attention_dim": 32, "caption_channels": 8},
    ),
    "WanPipeline": ("Wan", "WanTransformer3DModel", SMALL),
    "HunyuanDiTPipeline": (
        "HunyuanDiT", "HunyuanDiT2DModel",
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 16,
         "patch_size": 2, "in_channels": 4, "hidden_size": 16, "cross_attention_dim": 16,
         "cross_attention_dim_t5": 16, "pooled_projection_dim": 16},
    ),
    "LTXPipeline": ("LTX-Video", "LTXVideoTransformer3DModel", SMALL),
    "SanaPipeline": ("Sana", "SanaTransformer2DModel", {"num_layers": 1}),
    "Lumina2Pipeline": ("Lumina 2", "Lumina2Transformer2DModel", {"num_layers": 1}),
}  # fmt: skip
"""Pipelines of diffusers, with the class of their denoiser, by its own code."""

BFL = (
    "img_in.weight", "txt_in.weight", "time_in.in_layer.weight",
    "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.norm.key_norm.scale",
    "double_blocks.0.img_mlp.0.weight", "single_blocks.0.linear1.weight",
    "single_blocks.0.linear2.weight", "final_layer.linear.weight",
)  # fmt: skip
"""Names that FLUX.1, FLUX.2 and Chroma have in common."""
LIKE_FLUX = {
    "FLUX.2": ("double_stream_modulation_img.lin.weight", "single_stream_modulation.lin.weight"),
    "Chroma": ("distilled_guidance_layer.in_proj.weight",
               "distilled_guidance_layer.layers.0.in_layer.weight"),
}  # fmt: skip


def names_of(class_name: str, config: dict[str, Any]) -> list[str]:
    import diffusers

    with torch.device("meta"):
        return list(getattr(diffusers, class_name)(**config).state_dict())


def state(names: list[str] | tuple[str, ...]) -> layouts.State:
    return {name: torch.zeros(1) for name in names}


def refusal(place: Path) -> str:
    with pytest.raises(UnknownModelError) as caught:
        models.identify(models.open_checkpoint(place))
    assert caught.value.exit_code == 3
    return caught.value.what


def words(title: str) -> str:
    return f"these are the weights of {title}, which danqing does not support yet"


@pytest.mark.parametrize(("title", "telltales"), ROWS)
@pytest.mark.parametrize("prefix", ["", layouts.COMFY])
def test_a_single_file(title: str, telltales: tuple[str, ...], prefix: str, tmp_path: Path) -> None:
    file = layouts.save(tmp_path / "x.safetensors", layouts.prefixed(prefix, state(telltales)))
    assert refusal(file) == refusal(tmp_path) == words(title)


@pytest.mark.parametrize("title", LIKE_FLUX)
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_files_with_the_names_of_flux1(title: str, kind: str, tmp_path: Path) -> None:
    names = state((*BFL, *LIKE_FLUX[title]))
    place = tmp_path / f"x.{kind}"
    if kind == "gguf":
        layouts.write_gguf(place, "flux", names, "F32")
    else:
        layouts.save(place, names)
    assert refusal(place) == words(title)


@pytest.mark.parametrize("pipeline", CLASSES)
def test_a_diffusers_folder(pipeline: str, tmp_path: Path) -> None:
    """By the tensors, whatever the index says; and by the index, whatever is missing."""
    title, class_name, config = CLASSES[pipeline]
    names = names_of(class_name, config)
    row = recognise(names)
    assert row is not None
    assert row[0].title == title
    part = "unet" if "UNet" in class_name else "transformer"
    index = {"_class_name": "FluxPipeline", part: ["diffusers", "FluxTransformer2DModel"]}
    layouts.save(tmp_path / part / "diffusion_pytorch_model.safetensors", state(names))
    (tmp_path / part / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert refusal(tmp_path) == words(title)
    shutil.rmtree(tmp_path / part)
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": pipeline, part: ["diffusers", class_name]})
    )
    assert refusal(tmp_path) == words(title)


@pytest.mark.parametrize("class_name", ["FluxPipeline", "StableDiffusion3Pipeline"])
def test_classes_of_known_models_are_not_foreign(class_name: str) -> None:
    assert kind_of_classes([class_name]) is None


def test_a_foreign_file_beside_a_known_model_does_no_harm(
    schnell_bfl: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(schnell_bfl, tmp_path / "model")
    layouts.save(folder / "a.safetensors", state((*BFL, *LIKE_FLUX["Chroma"])))
    assert models.identify(models.open_checkpoint(folder)).name == "flux1-schnell"
    assert refusal(folder / "a.safetensors") == words("Chroma")


def test_two_models_side_by_side_must_be_named(
    schnell_bfl: Path, deepgen: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(schnell_bfl, tmp_path / "model")
    source = next((deepgen / "transformer").glob("*.safetensors"))
    shutil.copy(source, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match="more than one model side by side") as caught:
        models.open_checkpoint(folder)
    assert "other.safetensors" in str(caught.value)


def test_check_says_so(tmp_path: Path) -> None:
    file = layouts.save(tmp_path / "x.safetensors", state((*BFL, *LIKE_FLUX["FLUX.2"])))
    done = call_danqing("check", file)
    assert done.returncode == 3
    assert words("FLUX.2") in done.stderr
