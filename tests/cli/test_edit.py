"""Editing from the command line: pictures of every kind, and everything a user gets wrong."""

from __future__ import annotations

import io
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from danqing.cli import app
from danqing.references import read_references
from tests.conftest import run_danqing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUICK = ("--steps", "1", "--device", "cpu", "-q")
REQUEST, WEIGHTS = 2, 3


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.stderr, result.stderr
    assert "this is a bug" not in result.stderr, result.stderr
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def guitar(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    small.resize((90, 60), Image.Resampling.BICUBIC).save(tmp_path / "guitar.png")
    return tmp_path / "guitar.png"


def test_the_command_line_people_already_type(deepgen: Path, guitar: Path) -> None:
    """As the model's own script has it, with `generate` in place of the script."""
    done = run_danqing(
        "generate", "--model_path", deepgen,
        "--prompt", "Place this guitar on a sandy beach with the sunset in the background.",
        "--input_image", guitar.name, "--output_image", "output_edit.png",
        "--height", 128, "--width", 128, "--seed", 42, "--device", "cpu", "--steps", 2,
        cwd=guitar.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(guitar.parent / "output_edit.png") as image:
        assert image.size == (128, 128)
        record = json.loads(image.info["danqing"])
    assert record["request"]["image"][0]["path"].endswith("guitar.png")
    assert record["request"]["guidance_scale"] == 4.0
    assert "keeps its shape" in done.stderr


def test_edit_is_generate_with_an_image(deepgen: Path, guitar: Path, tmp_path: Path) -> None:
    names = [tmp_path / f"{name}.png" for name in "abc"]
    common = ("-m", deepgen, *QUICK, "--height", 64)
    assert invoke("edit", guitar, "wider", *common, "-o", names[0])[0] == 0
    assert invoke("edit", guitar, "-p", "wider", *common, "-o", names[1])[0] == 0
    assert invoke("generate", "wider", "--image", guitar, *common, "-o", names[2])[0] == 0
    pixels = [Image.open(name).tobytes() for name in names]
    assert pixels[0] == pixels[1] == pixels[2]
    assert Image.open(names[0]).size == (96, 64)


def test_size_and_shape(deepgen: Path, guitar: Path, tmp_path: Path) -> None:
    """The toy's pictures are of 192 x 192 pixels; 90 x 60 of that area are 236 x 157, rounded up."""
    sizes: dict[tuple[object, ...], tuple[int, int]] = {
        (): (256, 160),
        ("--width", 96): (96, 64),
        ("--height", 100): (160, 96),
        ("--size", "128x64"): (128, 64),
        ("--size", "128x128", "--resize", "stretch"): (128, 128),
        ("--resize", "stretch"): (192, 192),
    }
    out = ""
    for flags, expected in sizes.items():
        code, out, text = invoke(
            "edit", guitar, "x", "-m", deepgen, *flags, "--dry-run", "--json", "--device", "cpu"
        )
        assert code == 0, text
        request = json.loads(out)["request"]
        assert (request["width"], request["height"]) == expected, flags
    notes = json.loads(out)["notes"]
    assert not [note for note in notes if "keeps its shape" in note]
    assert not list(tmp_path.glob("deepgen*"))


def test_a_picture_can_be_made_again_from_itself(
    deepgen: Path, guitar: Path, tmp_path: Path
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    settings = ("--size", "96x64", "--seed", 5, *QUICK)
    assert invoke("edit", guitar, "a hat", "-m", deepgen, *settings, "-o", first)[0] == 0
    code, _, text = invoke("generate", "--from", first, "--trust", "-o", again)
    assert code == 0, text
    assert "the same picture, bit for bit" in text
    with Image.open(guitar) as image:
        turned = image.transpose(Image.Transpose.ROTATE_180)
    turned.save(guitar)
    code, _, text = invoke("generate", "--from", first, "--trust", "-o", again)
    assert code == REQUEST
    assert "not the one the picture was made from" in text
    other = tmp_path / "other.png"
    code, _, text = invoke(
        "generate", "--from", first, "-m", deepgen, "--image", guitar, "-o", other
    )
    assert code == 0, text
    assert Image.open(other).tobytes() != Image.open(first).tobytes()


def test_words_and_edits_in_one_prompts_file(deepgen: Path, guitar: Path, tmp_path: Path) -> None:
    """Each line is a request of its own, with its own padding, whatever stands beside it."""
    rows = [
        {"prompt": "a cat", "output_image": str(tmp_path / "0.png")},
        {"prompt": "a hat", "image": str(guitar), "output_image": str(tmp_path / "1.png")},
        {
            "prompt": "both", "image": [str(guitar), str(guitar)], "rules": "Keep the colours.",
            "output_image": str(tmp_path / "2.png"),
        },
    ]  # fmt: skip
    place = tmp_path / "prompts.jsonl"
    place.write_text("\n".join(map(json.dumps, rows)))
    settings = ("-m", deepgen, "--size", "64x64", *QUICK)
    code, out, text = invoke("generate", "--prompts-file", place, *settings, "--json")
    assert code == 0, text
    records = [json.loads(line) for line in out.splitlines()]
    assert [len(record["request"]["image"] or []) for record in records] == [0, 1, 2]
    assert records[2]["request"]["prompt"] == "Keep the colours. both"
    alone = tmp_path / "alone.png"
    assert invoke("edit", guitar, "a hat", *settings, "-o", alone)[0] == 0
    assert Image.open(alone).tobytes() == Image.open(tmp_path / "1.png").tobytes()
    ruled = tmp_path / "ruled.png"
    code, _, _ = invoke(
        "edit", guitar, "both", "--image", guitar, "--rules", "Keep the colours.", *settings,
        "-o", ruled,
    )  # fmt: skip
    assert code == 0
    assert Image.open(ruled).tobytes() == Image.open(tmp_path / "2.png").tobytes()


# --- pictures of every kind ----------------------------------------------------------------------


def gradient(mode: str) -> Image.Image:
    ramp = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint8)
    grey = Image.fromarray(ramp)
    if mode in ("I;16", "I"):
        return Image.fromarray(ramp.astype(np.uint16) * 257).convert(mode)
    if mode in ("RGBA", "LA", "PA"):
        layered = Image.merge("LA", (grey, grey.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
        return layered if mode == "LA" else layered.convert(mode)
    return grey.convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(gradient("RGB").transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (48, 32), colour) for colour in ("black", "blue")]
    return saved(gradient("RGB"), kind, save_all=True, append_images=frames)


def palette() -> bytes:
    image = gradient("RGB").quantize(16)
    return saved(image, "PNG", transparency=3)


KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "RGB": (lambda: saved(gradient("RGB"), "PNG"), ""),
    "JPEG": (lambda: saved(gradient("RGB"), "JPEG", quality=95), ""),
    "WebP": (lambda: saved(gradient("RGB"), "WEBP", lossless=True), ""),
    "BMP": (lambda: saved(gradient("RGB"), "BMP"), ""),
    "grey": (lambda: saved(gradient("L"), "PNG"), ""),
    "black and white": (lambda: saved(gradient("1"), "PNG"), ""),
    "palette": (lambda: saved(gradient("P"), "PNG"), ""),
    "transparent": (lambda: saved(gradient("RGBA"), "PNG"), "laid on white"),
    "transparent grey": (lambda: saved(gradient("LA"), "PNG"), "laid on white"),
    "transparent palette": (palette, "laid on white"),
    "CMYK": (lambda: saved(gradient("CMYK"), "JPEG", quality=95), "in CMYK"),
    "16 bits": (lambda: saved(gradient("I;16"), "PNG"), "16 bits were scaled"),
    "16 bits, TIFF": (lambda: saved(gradient("I;16"), "TIFF"), "16 bits were scaled"),
    "turned by EXIF": (turned, "turned upright"),
    "GIF of three frames": (lambda: animated("GIF"), "has several frames"),
    "PNG of three frames": (lambda: animated("PNG"), "has several frames"),
    "one pixel": (lambda: saved(Image.new("RGB", (1, 1), "red"), "PNG"), "tiny"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind(kind: str, deepgen: Path, tmp_path: Path) -> None:
    make, words = KINDS[kind]
    place = tmp_path / "picture"
    place.write_bytes(make())
    out = tmp_path / "out.png"
    code, _, text = invoke("edit", place, "x", "-m", deepgen, "--size", "96x64", *QUICK, "-o", out)
    assert code == 0, text
    assert words in text
    if not words:
        assert "picture:" not in text
    assert Image.open(out).size == (96, 64)


@pytest.mark.parametrize("kind", ["16 bits", "grey", "turned by EXIF", "JPEG", "CMYK"])
def test_they_all_show_the_same(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "picture"
    place.write_bytes(KINDS[kind][0]())
    (found,) = read_references(place)
    expected = np.asarray(gradient("RGB"), int)
    if kind == "turned by EXIF":
        expected = np.asarray(
            gradient("RGB").transpose(Image.Transpose.ROTATE_90).rotate(-90, expand=True), int
        )
    assert found.image.mode == "RGB"
    assert np.abs(np.asarray(found.image, int) - expected).max() <= 12


def test_what_is_transparent_becomes_white() -> None:
    (found,) = read_references(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    assert found.image.getpixel((0, 0)) == (255, 255, 255)


# --- what a user gets wrong ----------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def huge(path: Path) -> None:
    """Write a picture that is small on disk and a gigabyte in memory."""
    Image.new("1", (30_000, 12_000)).save(path)


def bomb(path: Path) -> None:
    """Write more pixels than Pillow itself would open."""
    header = bytearray(saved(Image.new("1", (8, 8)), "PNG"))
    header[16:24] = (60_000).to_bytes(4, "big") + (60_000).to_bytes(4, "big")
    import zlib

    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    path.write_bytes(header)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def floating(path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(path, "TIFF")


PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda p: p.unlink(), "reference image not found"),
    "a text": (lambda p: p.write_text("hello"), "no format that can be read"),
    "empty": (lambda p: p.write_bytes(b""), "no format that can be read"),
    "cut short": (cut, "cannot be read"),
    "a folder": (a_folder, "cannot be read"),
    "too large": (huge, "too large"),
    "a bomb": (bomb, "too large"),
    "floating point": (floating, "floating point"),
    "a thread": (lambda p: Image.new("RGB", (4000, 2)).save(p), "too long and narrow"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures_that_cannot_be_edited(case: str, deepgen: Path, guitar: Path) -> None:
    spoil, words = PICTURES[case]
    spoil(guitar)
    out = guitar.parent / "out.png"
    code, _, text = invoke("edit", guitar, "x", "-m", deepgen, *QUICK, "--size", "64x64", "-o", out)
    assert (code, words in text) == (REQUEST, True), text
    assert not out.exists()


REQUESTS: dict[str, tuple[tuple[object, ...], str]] = {
    "no prompt": ((), "there is no prompt"),
    "a blank prompt": (("  ",), "prompt is empty"),
    "a resize of another name": (("x", "--resize", "crop"), "keep, stretch"),
    "a latent of another name": (("x", "--reference-latent", "mean"), "sample, mode"),
    "tokens to read": (("x", "--max-sequence-length", 77), "reads the whole prompt"),
    "too large": (("x", "--height", 4096), "too large for DeepGen-1.0"),
    "guidance below zero": (("x", "--guidance", -1), "guidance_scale is out of range"),
    "no steps": (("x", "--steps", 0), "num_inference_steps is out of range"),
    "the word for a picture": (("see <|image_pad|>",), "word that stands for a picture"),
    "an unknown placement": (("x", "--placement", "cloud"), "auto, resident, staged"),
    "rules for another picture's prompt": (("--from", "x.png", "--rules", "r"), "from the picture"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_requests_that_cannot_be(case: str, deepgen: Path, guitar: Path) -> None:
    words, expected = REQUESTS[case]
    out = guitar.parent / "out.png"
    code, _, text = invoke("edit", guitar, *words, "-m", deepgen, "--device", "cpu", "-o", out)
    assert (code, expected in text) == (REQUEST, True), text
    assert not out.exists()


def test_nine_pictures_are_too_many(deepgen: Path, guitar: Path) -> None:
    more = [word for _ in range(8) for word in ("--image", guitar)]
    code, _, text = invoke("edit", guitar, "x", *more, "-m", deepgen)
    assert (code, "at most 8" in text) == (REQUEST, True), text


@pytest.mark.parametrize("flag", ["--resize", "--reference-latent"])
def test_flags_of_edits_have_no_effect_on_words(flag: str, deepgen: Path) -> None:
    value = {"--resize": "stretch", "--reference-latent": "mode"}[flag]
    code, _, text = invoke("generate", "x", "-m", deepgen, flag, value)
    assert (code, "without a picture to edit" in text) == (REQUEST, True), text


def test_a_model_that_cannot_edit_says_so(schnell: Path, guitar: Path) -> None:
    code, _, text = invoke("edit", guitar, "x", "-m", schnell)
    assert (code, "paint from words alone" in text) == (REQUEST, True), text
    assert "guitar.png" in text


def tensors(
    name: str, change: Callable[[dict[str, torch.Tensor]], object]
) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name)

    return damage


def config(name: str, **changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        table = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**table, **changes}))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return damage


def small_tokenizer(folder: Path) -> None:
    """Take one of another model: its words for pictures are several tokens."""
    config("tokenizer/tokenizer_config.json", added_tokens_decoder={})(folder)


CONNECTOR = "connector/model.safetensors"
DIT = "transformer/diffusion_pytorch_model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no vlm": (remove("vlm"), "has no vlm"),
    "no connector": (remove("connector"), "has no connector"),
    "no transformer": (remove("transformer"), "has no transformer"),
    "no vae": (remove("vae"), "has no vae"),
    "no tokenizer": (remove("tokenizer"), "has no tokenizer"),
    "no vocabulary": (remove("tokenizer/merges.txt"), "tokenizer"),
    "a shard is missing": (remove("vlm/model-00002-of-00002.safetensors"), "vlm are missing"),
    "no config of the vlm": (remove("vlm/config.json"), "has no vlm"),
    "no config of the transformer": (remove("transformer/config.json"), "config file is missing"),
    "a config of nonsense": (config("vlm/config.json", text_config=5), "text_config in the config of vlm is not usable"),
    "a vlm of other width": (
        config("vlm/config.json", vision_config={"depth": 1, "hidden_size": 32}), "vlm",
    ),
    "other heads": (config("connector/config.json", num_attention_heads=7), "heads do not divide"),
    "odd epsilon": (config("connector/config.json", layer_norm_eps="x"), "layer_norm_eps"),
    "a connector without queries": (
        tensors(CONNECTOR, lambda s: s.pop("meta_queries")), "no connector",
    ),
    "a connector without bias": (
        tensors(CONNECTOR, lambda s: s.pop("projector_1.bias")), "1 missing: projector_1.bias",
    ),
    "a connector of another width": (
        tensors(CONNECTOR, lambda s: s.update(meta_queries=torch.zeros(8, 31))), "does not fit its tensors",
    ),
    "queries of no shape": (
        tensors(CONNECTOR, lambda s: s.update(meta_queries=torch.zeros(8))), "impossible shape",
    ),
    "a transformer of another context": (
        tensors(
            DIT, lambda s: s.update({"context_embedder.weight": torch.zeros(64, 41)})
        ),
        "context_embedder.weight",
    ),
    "a transformer with one tensor more": (
        tensors(DIT, lambda s: s.update(x=torch.zeros(1))), "unexpected: x",
    ),
    "a schedule of nonsense": (
        config("scheduler/scheduler_config.json", num_train_timesteps="x"), "not usable",
    ),
    "a tokenizer of another model": (small_tokenizer, "tokenizer is of another model"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights(case: str, deepgen: Path, guitar: Path) -> None:
    damage, words = DAMAGE[case]
    folder = guitar.parent / "model"
    shutil.copytree(deepgen, folder)
    damage(folder)
    out = guitar.parent / "out.png"
    code, _, text = invoke("edit", guitar, "x", "-m", folder, "--size", "64x64", *QUICK, "-o", out)
    assert (code, words in text) == (WEIGHTS, True), text
    assert not out.exists()
