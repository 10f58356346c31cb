"""DeepGen-1.0 at toy size against stock parts put together by the test, and its real sizes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import danqing
from danqing.errors import CheckpointError
from danqing.models import flow
from danqing.models.deepgen import NEGATIVE_EDIT, fitted_size, language, prompts, transformer
from danqing.models.deepgen.connector import Connector
from danqing.models.kinds import kind_of
from danqing.networks.loading import on_meta
from tests import deepgen_reference as stock
from tests import deepgen_toys as toys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT = "a small red boat, naïve, 丹青"
CLOSE = 1e-5


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Say whether they agree to about float32's own precision, seen from the largest value."""
    return float((found - expected).abs().max() / expected.abs().max()) < CLOSE


@pytest.fixture(scope="module")
def parts(deepgen: Path) -> stock.Parts:
    return stock.load(deepgen)


@pytest.fixture(scope="module")
def engine(deepgen: Path) -> Iterator[danqing.Engine]:
    with danqing.open(deepgen, device="cpu") as engine:
        yield engine


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def same(_: int, latents: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
    return latents


def stages(engine: danqing.Engine, **settings: Any) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """Run the three stages by hand; return conditioning, pixels, and what was drawn."""
    request = engine.spec.resolve(danqing.Request(**settings))
    model: Any = engine._model
    with torch.inference_mode():
        load = {
            stage: engine._residence.load(names, [], None) for stage, names in model.stages.items()
        }
        conditioning, _ = model.encode(load["encode"], request)
        drawn = model.draw(request, request.seed)
        latents = model.denoise(load["denoise"], conditioning, [drawn], request, same)
        return conditioning, model.decode(load["decode"], latents, request), drawn


# --- real sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "tensors", "elements"),
    [
        (lambda: Connector(toys.RELEASED["connector"]), 103, 432_449_532),
        (lambda: kind_of("sd3_transformer").make(toys.RELEASED["transformer"]), 909, 2_469_663_936),
        (lambda: kind_of("kl").make(toys.RELEASED["vae"]), 244, 83_819_683),
        (lambda: kind_of("qwen_vl").make(toys.vlm_config(released=True)), 824, 3_754_622_976),
        (
            lambda: kind_of("qwen_vl").make(toys.vlm_config(released=True, legacy=True)),
            824,
            3_754_622_976,
        ),
    ],
    ids=["connector", "transformer", "vae", "vlm", "vlm, config of before 4.52"],
)
def test_the_released_sizes(make: Any, tensors: int, elements: int) -> None:
    """Counts read from the released files' headers by others."""
    state = on_meta(make).state_dict()
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == elements


# --- against stock parts -------------------------------------------------------------------------


@pytest.mark.parametrize("negative", ["", "blurry, dark", "x" * 90])
@pytest.mark.parametrize("guidance", [4.0, 1.7])
def test_words_alone(
    engine: danqing.Engine, parts: stock.Parts, negative: str, guidance: float
) -> None:
    """Shorter and longer negative prompts: the padding goes before one row or the other."""
    settings = {"height": 64, "width": 96, "num_inference_steps": 3, "guidance_scale": guidance}
    conditioning, pixels, drawn = stages(
        engine, prompt=f"  {PROMPT} ", negative_prompt=negative, seed=7, **settings
    )
    sequence, pooled, _ = stock.encode(parts, [PROMPT, negative])
    assert close(conditioning.context, sequence)
    assert close(conditioning.pooled, pooled)
    expected = stock.paint(parts, PROMPT, negative, drawn[0], steps=3, guidance=guidance)
    assert float((pixels - expected).abs().max()) / 2 < CLOSE  # of 0 to 1
    assert pixels.std() > 0.1


@pytest.mark.parametrize(
    "sizes", [[(64, 96)], [(96, 64), (64, 64)], [(128, 64), (64, 96), (32, 32)]]
)
def test_edits(engine: danqing.Engine, parts: stock.Parts, sizes: list[tuple[int, int]]) -> None:
    """One, two and three pictures of different shapes."""
    images = [picture(width, height, seed) for seed, (height, width) in enumerate(sizes)]
    settings: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 2, "seed": 3}
    request = engine.spec.resolve(danqing.Request(prompt=PROMPT, image=images, **settings))
    fitted = [fitted_size(image, request) for image in request.image]
    conditioning, pixels, drawn = stages(engine, prompt=PROMPT, image=images, **settings)
    shown = [stock.pixels_of(im, *size) for im, size in zip(images, fitted, strict=True)]
    sequence, pooled, _ = stock.encode(parts, [PROMPT, NEGATIVE_EDIT], shown)
    assert close(conditioning.context, sequence)
    assert close(conditioning.pooled, pooled)
    expected = stock.paint(
        parts, PROMPT, NEGATIVE_EDIT, drawn[0], steps=2, guidance=4.0, pictures=shown,
        draws=drawn[1:],
    )  # fmt: skip
    assert float((pixels - expected).abs().max()) / 2 < CLOSE  # of 0 to 1


def test_without_guidance_the_negative_prompt_still_pads(
    engine: danqing.Engine, parts: stock.Parts
) -> None:
    """The original encodes it all the same, and the padding is part of the prompt's row."""
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 1}
    conditioning, _, _ = stages(
        engine, prompt="a cat", negative_prompt="z" * 50, guidance_scale=1.0, **settings
    )
    sequence, pooled, _ = stock.encode(parts, ["a cat", "z" * 50])
    assert conditioning.context.shape[0] == 1
    assert close(conditioning.context, sequence[:1])
    assert close(conditioning.pooled, pooled[:1])


def test_swapping_prompts_swaps_the_branches(engine: danqing.Engine) -> None:
    """v = u + s (c - u) with c and u exchanged and 1 - s is the same velocity."""
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 1}
    request = engine.spec.resolve(
        danqing.Request(prompt="a cat", negative_prompt="a dog", guidance_scale=3.0, **settings)
    )
    model: Any = engine._model
    conditioning, _, drawn = stages(
        engine, prompt="a cat", negative_prompt="a dog", guidance_scale=3.0, **settings
    )
    load = engine._residence.load(("transformer",), [], None)

    def run(rows: Any, scale: float) -> torch.Tensor:
        told = type(conditioning)(
            context=conditioning.context[rows], pooled=conditioning.pooled[rows], means=(),
            deviations=(),
        )  # fmt: skip
        asked = dataclasses.replace(request, guidance_scale=scale)
        with torch.inference_mode():
            out: torch.Tensor = model.denoise(load, told, [drawn], asked, same)
        return out

    assert torch.allclose(run([0, 1], 3.0), run([1, 0], -2.0), atol=1e-4)
    assert torch.allclose(run([0, 1], 1.0), run([0], 0.0), atol=1e-5)
    assert torch.allclose(run([0, 1], 0.0), run([1], 0.0), atol=1e-5)


def test_the_transformer_without_references_is_stock(parts: stock.Parts) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 16, 8, 12, generator=generator)
    context = torch.randn(3, 17, 40, generator=generator)
    pooled = torch.randn(3, 24, generator=generator)
    time = torch.tensor([1000.0, 431.2, 8.9])
    with torch.no_grad():
        theirs = parts.transformer(latents, context, pooled, time, return_dict=False)[0]
        ours = transformer.predict(
            parts.transformer, [*latents], [[]] * 3, [*context], pooled, time
        )
    assert torch.allclose(torch.stack(ours), theirs, atol=1e-5)


def test_a_ragged_batch_is_its_single_runs(parts: stock.Parts) -> None:
    """Different sizes, numbers of references and lengths of context, in one call."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 8), (8, 12), (8, 8), (4, 4)]
    references = [[], [(8, 8)], [], [(8, 4), (12, 12)]]
    latents = [torch.randn(16, *size, generator=generator) for size in sizes]
    told = [[torch.randn(16, *size, generator=generator) for size in row] for row in references]
    context = [torch.randn(length, 40, generator=generator) for length in (9, 20, 9, 20)]
    pooled = torch.randn(4, 24, generator=generator)
    time = torch.full((4,), 500.0)
    with torch.no_grad():
        together = transformer.predict(parts.transformer, latents, told, context, pooled, time)
        for row, found in enumerate(together):
            alone = stock.transform(
                parts, latents[row][None], [one[None] for one in told[row]], context[row][None],
                pooled[row : row + 1], time[:1],
            )  # fmt: skip
            assert torch.allclose(found, alone[0], atol=1e-5)


def test_states_are_the_library_s_hidden_states(engine: danqing.Engine, parts: stock.Parts) -> None:
    embeds = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    places = torch.arange(11).expand(3, 2, -1)
    vlm = engine._residence.load(("vlm",), [], None)["vlm"]
    assert len(vlm.language_model.layers) == 35
    with torch.no_grad():
        ours = language.states(vlm, embeds, places)
        theirs = stock.hidden_states(
            parts.vlm.model.language_model, embeds, torch.ones(2, 11), places
        )
    assert language.depths(36) == [35, 29, 23, 17, 11, 5]
    wanted = torch.cat([theirs[depth] for depth in (35, 29, 23, 17, 11, 5)], -1)
    assert torch.allclose(ours, wanted, atol=1e-5)


def test_padding_is_what_the_perceptrons_make_of_it(
    engine: danqing.Engine, parts: stock.Parts
) -> None:
    """The library's SDPA gives zero for rows that see nothing, as the original's kernel does."""
    _, _, theirs = stock.encode(parts, ["a", "a much longer prompt"])
    vlm = engine._residence.load(("vlm",), [], None)["vlm"]
    with torch.no_grad():
        ours = language.padding_states(vlm, toys.ID["<|endoftext|>"])
    wanted = torch.cat([theirs[depth][0, 0] for depth in (35, 29, 23, 17, 11, 5)])
    assert torch.allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (160, 32), (32, 224)])
def test_the_vision_tower_sees_what_the_library_s_processor_shows(
    engine: danqing.Engine, parts: stock.Parts, size: tuple[int, int]
) -> None:
    pixels = stock.pixels_of(picture(size[1], size[0]), *size)
    patches, grid = stock.patches_of(pixels)
    vlm = engine._residence.load(("vlm",), [], None)["vlm"]
    with torch.no_grad():
        ours, found = language.see(vlm, pixels)
        theirs: Any = parts.vlm.model.visual(patches, grid_thw=grid)
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    assert found == (size[0] // 32, size[1] // 32)
    assert len(ours) == size[0] // 32 * (size[1] // 32)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_golden_timesteps_of_the_schedule(engine: danqing.Engine) -> None:
    """Of shift 3, from facts known outside this project."""
    model: Any = engine._model

    def times(steps: int) -> list[float]:
        asked = danqing.Request(prompt="a", num_inference_steps=steps, height=64, width=64)
        request = engine.spec.resolve(asked)
        schedule = model.schedule(
            request.num_inference_steps, tokens=16, device=torch.device("cpu")
        )
        return [float(t) for t in schedule.timesteps]

    assert times(4) == pytest.approx([1000, 857.6923, 602.1506, 8.9286], abs=1e-3)
    assert times(50)[:5] == pytest.approx([1000, 993.1244, 986.0571, 978.7898, 971.3141], abs=1e-3)
    assert times(50)[-3:] == pytest.approx([120.5327, 66.9002, 8.9286], abs=1e-3)


def test_a_schedule_that_shifts_by_resolution_is_followed(tmp_path: Path) -> None:
    folder = toys.write(tmp_path / "dynamic", dynamic=True)
    with danqing.open(folder, device="cpu") as engine:
        model: Any = engine._model
        asked = danqing.Request(prompt="a", num_inference_steps=4, height=64, width=64)
        request = engine.spec.resolve(asked)
        tokens = model.image_tokens(request.height, request.width)
        scheduler = model.schedule(4, tokens=tokens, device=torch.device("cpu"))
    mu = flow.resolution_shift(16, max_shift=1.16)
    expected = stock.load(folder).scheduler
    expected.set_timesteps(4, mu=mu)
    assert torch.equal(scheduler.timesteps, expected.timesteps)


# --- prompts -------------------------------------------------------------------------------------


def test_templates() -> None:
    template = prompts.Template()
    assert template.row(" a {cat} ", []) == (
        "<|im_start|>user\nGenerate an image: a {cat}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.row("wider", [2, 1]) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|vision_end|>\nwider<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.row("", []) == stock.row("", [])


def test_the_template_beside_the_weights_is_used(deepgen: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(deepgen, folder)
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}

    def paint() -> bytes:
        with danqing.open(folder, device="cpu") as engine:
            return engine.generate("a cat", **settings).image.tobytes()

    first = paint()
    table = {
        "GENERATION": "Generate an image: {input}", "IMG_START_TOKEN": "<|vision_start|>",
        "INSTRUCTION": "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "STOP_WORDS": ["<|im_end|>"],
    }  # fmt: skip
    place = folder / "prompt_template.json"
    place.write_text(json.dumps(table))
    assert paint() == first
    place.write_text(json.dumps({**table, "GENERATION": "Draw: {input}"}))
    assert paint() != first
    for wrong in ({"GENERATION": "nothing"}, {"INSTRUCTION": 3}, {"IMG_CONTEXT_TOKEN": ""}):
        place.write_text(json.dumps({**table, **wrong}))
        with pytest.raises(CheckpointError, match="template"):
            paint()


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
def test_both_names_of_the_language_model_s_tensors(
    deepgen: Path, tmp_path: Path, legacy: bool
) -> None:
    folder = toys.write(tmp_path / "other", legacy=legacy, vlm_shards=1)
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}
    with danqing.open(folder, device="cpu") as one, danqing.open(deepgen, device="cpu") as two:
        ours, theirs = (each.generate("a cat", **settings).image.tobytes() for each in (one, two))
    assert ours == theirs


@pytest.mark.parametrize("prefix", ["layers.", "encoder.layers.", "connector.layers."])
@pytest.mark.parametrize("config", [True, False])
def test_the_connector_under_other_names(
    deepgen: Path, tmp_path: Path, prefix: str, config: bool
) -> None:
    """Without a config its heads are taken to have 64 channels, as the released ones have."""
    folder = tmp_path / "named"
    shutil.copytree(deepgen, folder)
    place = folder / "connector" / "model.safetensors"
    state = load_file(place)
    save_file({name.replace("connector.layers.", prefix): t for name, t in state.items()}, place)
    if not config:
        (folder / "connector" / "config.json").unlink()
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}
    with danqing.open(folder, device="cpu") as one, danqing.open(deepgen, device="cpu") as two:
        ours, theirs = (each.generate("a cat", **settings).image.tobytes() for each in (one, two))
    assert ours == theirs


def test_a_folder_without_its_language_model_is_refused(deepgen: Path, tmp_path: Path) -> None:
    """The first upload had none, and stock Qwen in its place paints something else."""
    folder = tmp_path / "first-upload"
    shutil.copytree(deepgen, folder)
    shutil.rmtree(folder / "vlm")
    with pytest.raises(CheckpointError, match="no vlm") as caught:
        danqing.open(folder, device="cpu")
    assert "fine-tuned" in str(caught.value)


def test_the_index_is_not_needed(deepgen: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no-index"
    shutil.copytree(deepgen, folder)
    (folder / "model_index.json").unlink()
    with danqing.open(folder, device="cpu") as engine:
        assert engine.spec.name == "deepgen-1.0"


def test_bfloat16_comes_close_and_the_connector_is_cast(
    tmp_path: Path, engine: danqing.Engine
) -> None:
    folder = toys.write(tmp_path / "bf16", dtype=torch.bfloat16)
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
    with danqing.open(folder, device="cpu") as narrow:
        planned = {part.name: (part.stored, part.dtype) for part in narrow.plan.components}
        assert planned["connector"] == ("float32", "bfloat16")
        ours = np.asarray(narrow.generate("a cat", image=picture(64, 64), **settings).image, int)
    wide = np.asarray(engine.generate("a cat", image=picture(64, 64), **settings).image, int)
    assert 0 < np.abs(ours - wide).mean() < 6


# --- randomness and reuse ------------------------------------------------------------------------


def test_everything_random_comes_from_the_seed(engine: danqing.Engine) -> None:
    settings: dict[str, Any] = {
        "image": picture(80, 64), "height": 64, "width": 64, "num_inference_steps": 2,
    }  # fmt: skip

    def paint(**more: Any) -> bytes:
        torch.rand(3)  # moves the global generator, which must not matter
        return engine.generate("a cat", **settings, **more).image.tobytes()

    assert paint() == paint() == paint(seed=42)
    assert paint() != paint(seed=43)
    assert paint(reference_latent="mode") == paint(reference_latent="mode")
    assert paint(reference_latent="mode") != paint(reference_latent="sample") == paint()


def test_a_second_seed_costs_no_second_encoding(engine: danqing.Engine) -> None:
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}
    engine.close()
    first = engine.generate("a bird", seed=1, **settings)
    second = engine.generate("a bird", seed=2, **settings)
    third = engine.generate("a bird", seed=2, negative_prompt="dark", **settings)
    reused = [
        next(cost.reused for cost in generation.stages if cost.name == "encode")
        for generation in (first, second, third)
    ]
    assert reused == [False, True, False]


def test_a_batch_of_edits_is_close_to_single_ones(engine: danqing.Engine) -> None:
    settings: dict[str, Any] = {
        "image": picture(64, 64), "height": 64, "width": 64, "num_inference_steps": 2,
        "num_images_per_prompt": 3,
    }  # fmt: skip
    together = engine.generate("a cat", batch=3, **settings)
    alone = engine.generate("a cat", batch=1, **settings)
    for one, other in zip(together.images, alone.images, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_words_alone_read_no_autoencoder_to_encode(deepgen: Path) -> None:
    with danqing.open(deepgen, device="cpu", placement="staged") as engine:
        model: Any = engine._model
        words = engine.spec.resolve(danqing.Request(prompt="a"))
        assert (words.height, words.width) == (192, 192)  # its transformer knows few places
        edit = engine.spec.resolve(danqing.Request(prompt="a", image=picture(64, 64)))
        assert model.needs("encode", words) == ("vlm", "connector")
        assert model.needs("encode", edit) == ("vlm", "connector", "vae")
        engine.generate("a", height=64, width=64, num_inference_steps=1)
        assert engine._residence.modules == {}
