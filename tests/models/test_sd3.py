"""The same weights, noise and request in danqing and in diffusers' StableDiffusion3Pipeline."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import danqing
from danqing import models
from danqing.errors import NoEffectError, RequestError, TensorMismatchError
from danqing.models.kinds import kind_of
from danqing.models.kinds.clip import ClipWithProjection
from danqing.models.sd3.model import SD3Model
from danqing.networks.loading import on_meta
from danqing.weights import Component
from tests import sd3_toys, sparse, toys

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.request import Resolved

PROMPT = "a photo of a blue pizza"
SMALL = {"height": 96, "width": 64, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_toys.write(tmp_path_factory.mktemp("sd3") / "toy")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return sd3_toys.open_with_diffusers(folder)


def stages(
    folder: Path, request: danqing.Request
) -> tuple[Any, list[torch.Tensor], torch.Tensor, Resolved]:
    """Run the three stages by hand; return conditioning, latents of each step, pixels."""
    with danqing.open(folder, device="cpu", dtype="float32") as engine, torch.inference_mode():
        resolved = engine.spec.resolve(request)
        model = models.open_model(engine.checkpoint, engine.spec)
        modules = {
            name: model.build(
                name, dtype="float32", device=torch.device("cpu"), on_bytes=lambda _: None
            )
            for name in model.networks
        }
        conditioning, _ = model.encode(modules, resolved)
        steps: list[torch.Tensor] = []

        def keep(_: int, now: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
            steps.append(now.clone())
            return now

        drawn = [model.draw(resolved, resolved.seed)]
        latents = model.denoise(modules, conditioning, drawn, resolved, keep)
        return conditioning, steps, model.decode(modules, latents, resolved), resolved


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"negative_prompt": "blurry, dark"}, {"guidance_scale": 7.0}, {"guidance_scale": 1.0},
        {"max_sequence_length": 24},
    ],
    ids=["defaults", "negative prompt", "guidance", "no guidance", "short"],
)  # fmt: skip
def test_float32_is_diffusers_to_the_last_bit(
    folder: Path, pipe: Any, settings: dict[str, Any]
) -> None:
    """Embeddings, latents after each step, and the image."""
    request = danqing.Request(prompt=PROMPT, seed=42, **SMALL, **settings)
    conditioning, ours, _, resolved = stages(folder, request)
    asked = {
        "negative_prompt": resolved.negative_prompt,
        "max_sequence_length": resolved.max_sequence_length,
    }
    with torch.no_grad():
        embeds, negative, pooled, _ = pipe.encode_prompt(PROMPT, None, None, **asked)
    guided = resolved.guidance_scale > 1
    assert torch.equal(conditioning.prompt_embeds[:1], embeds)
    assert torch.equal(conditioning.pooled_embeds[:1], pooled)
    assert len(conditioning.prompt_embeds) == 1 + guided
    if guided:
        assert torch.equal(conditioning.prompt_embeds[1:], negative)
    theirs: list[torch.Tensor] = []

    def keep(_pipe: Any, _step: int, _time: Any, state: dict[str, Any]) -> dict[str, Any]:
        theirs.append(state["latents"].clone())
        return state

    expected = pipe(
        PROMPT, generator=torch.Generator().manual_seed(42), callback_on_step_end=keep,
        guidance_scale=resolved.guidance_scale, **SMALL, **asked,
    ).images[0]  # fmt: skip
    assert len(ours) == len(theirs) == 3
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    for placement in ("resident", "streamed"):
        with danqing.open(folder, device="cpu", dtype="float32", placement=placement) as engine:
            assert engine.plan.placement == placement
            image = engine.generate(request).image
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_a_batch_is_its_images_one_by_one(folder: Path) -> None:
    request = danqing.Request(prompt=PROMPT, seed=1, num_images_per_prompt=2, **SMALL)
    with danqing.open(folder, device="cpu", dtype="float32") as engine:
        together = [one.image for one in engine.generate(request, batch=2).pictures]
        alone = [one.image for one in engine.generate(request, batch=1).pictures]
    for mine, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(mine, int) - np.asarray(other, int)).max() <= 1


def test_defaults_are_those_of_the_model_card() -> None:
    from danqing.models.sd3 import spec

    resolved = spec().resolve(danqing.Request(prompt="a"))
    assert (resolved.height, resolved.width, resolved.num_inference_steps) == (1024, 1024, 40)
    assert (resolved.guidance_scale, resolved.max_sequence_length) == (4.5, 256)
    assert resolved.negative_prompt == ""
    assert spec().name == "sd3.5-medium"
    assert spec("3-medium").name == "sd3-medium"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_sequence_length": 513}, RequestError), ({"height": 400}, RequestError),
        ({"resize": "keep"}, NoEffectError), ({"reference_latent": "mode"}, NoEffectError),
    ],
)  # fmt: skip
def test_settings_beyond_it_are_refused(
    folder: Path, settings: dict[str, Any], error: type[Exception]
) -> None:
    spec = models.identify(models.open_checkpoint(folder))
    with pytest.raises(error):
        spec.resolve(danqing.Request(prompt="a", **settings))


def test_the_clips_the_wrong_way_round(folder: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    names = {child.name: child for child in folder.iterdir()}
    names["text_encoder"], names["text_encoder_2"] = (
        names["text_encoder_2"], names["text_encoder"].parent / "text_encoder_3",
    )  # fmt: skip
    for name, place in names.items():
        (swapped / name).symlink_to(place)
    with pytest.raises(TensorMismatchError, match="text_encoder_2"):
        models.open_model(
            models.open_checkpoint(swapped), models.identify(models.open_checkpoint(swapped))
        )


# --- real sizes ----------------------------------------------------------------------------------


def published(name: str) -> Any:
    """Make one of the networks as diffusers and transformers have it, at its real size."""
    return on_meta(lambda: sd3_toys.make_network(name, sd3_toys.RELEASED[name]))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the released folder with sparse files: every tensor of the published networks."""
    folder = tmp_path_factory.mktemp("released")
    for name in sd3_toys.RELEASED:
        network = published(name)
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        if name == "text_encoder_3":
            shapes.pop("encoder.embed_tokens.weight")  # tied, and kept once
        (folder / name).mkdir()
        sparse.write_sparse(folder / name / "model.safetensors", shapes, "BF16")
        (folder / name / "config.json").write_text(json.dumps(sd3_toys.RELEASED[name]))
    toys.write_clip_tokenizer(folder / "tokenizer")
    toys.write_clip_tokenizer(folder / "tokenizer_2")
    toys.write_t5_tokenizer(folder / "tokenizer_3")
    (folder / "scheduler").mkdir()
    schedule = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    classes = {
        **dict.fromkeys(("text_encoder", "text_encoder_2"), "CLIPTextModelWithProjection"),
        "text_encoder_3": "T5EncoderModel", "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast",
    }  # fmt: skip
    index: dict[str, Any] = {name: ["transformers", kind] for name, kind in classes.items()}
    index |= {
        "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "_class_name": "StableDiffusion3Pipeline",
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_every_key_and_shape_of_the_release(released: Path) -> None:
    checkpoint = models.open_checkpoint(released)
    spec = models.identify(checkpoint)
    assert spec.name == "sd3.5-medium"
    assert spec.limits == {"height": 6144, "width": 6144, "max_sequence_length": 512}
    model = models.open_model(checkpoint, spec)
    assert isinstance(model, SD3Model)
    sizes = {
        "text_encoder": (197, 123_650_304), "text_encoder_2": (517, 694_659_840),
        "text_encoder_3": (219, 4_762_310_656), "transformer": (909, 2_469_663_936),
        "vae": (244, 83_819_683),
    }  # fmt: skip
    for name, size in sizes.items():
        entries = checkpoint.components[name].entries.values()
        assert (len(entries), sum(math.prod(entry.shape) for entry in entries)) == size
        assert model.elements(name) == size[1]
    resolved = spec.resolve(danqing.Request(prompt="a"))
    assert model.tokens(resolved) == (333, 0, 4096)
    assert model.conditioning_size(resolved) == 2 * (333 * 4096 + 2048)


def test_shapes_tell_what_the_published_configs_say(released: Path) -> None:
    """Of files without a config: all but the activation of CLIP-G, which the family knows."""
    parts = models.open_checkpoint(released).components
    kinds = {
        "text_encoder": ClipWithProjection(), "text_encoder_2": ClipWithProjection(),
        "text_encoder_3": kind_of("t5"), "transformer": kind_of("sd3_transformer"),
        "vae": kind_of("kl"),
    }  # fmt: skip
    for name, kind in kinds.items():
        part = parts[name]
        bare = Component(name=name, style=part.style, folder=part.folder, files=part.files)
        derived = kind.read_config(bare, SD3Model.known_values.get(name, {})).values
        for key, value in sd3_toys.RELEASED[name].items():
            if key in derived and not key.endswith("token_id"):
                given = list(value) if isinstance(value, tuple) else value
                assert derived[key] == given, (name, key)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "3.5-medium"), ({"dual_attention_layers": ()}, "3.5-large"),
        ({"dual_attention_layers": (), "qk_norm": None}, "3-medium"),
    ],
)  # fmt: skip
def test_which_one_is_read_from_the_tensors(
    folder: Path, tmp_path: Path, changes: dict[str, Any], kind: str
) -> None:
    network = sd3_toys.make_network("transformer", {**sd3_toys.TRANSFORMER, **changes})
    network.save_pretrained(tmp_path / "other")
    checkpoint = models.open_checkpoint(folder, {"transformer": tmp_path / "other"})
    spec = models.identify(checkpoint)
    assert spec.kind == kind
    model = models.open_model(checkpoint, spec)
    counts = model.kind("transformer").counts(checkpoint.component("transformer"), {})
    assert counts["num_layers"] == 3
    assert counts["dual_attention_layers"] == list(changes.get("dual_attention_layers", (0, 1)))
