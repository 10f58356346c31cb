"""Whatever a user gets wrong: a documented error and exit code, and no half-written picture.

The first table damages weights, the second requests, the third outputs; signals and full disks are
in `test_interruptions.py`. Exit codes are those of docs/reference/errors.md.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from danqing.cli import app
from tests import toys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUICK = ("--size", "64x64", "--seed", "1", "--device", "cpu", "-q")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
T5 = "text_encoder_2/model.safetensors"

WEIGHTS, REQUEST, DEVICE, PICTURE, OUTPUT = 3, 2, 4, 6, 7


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    text = result.stderr
    assert "Traceback" not in text, text
    assert "this is a bug" not in text, text
    return result.exit_code, text


def no_pictures(folder: Path) -> bool:
    return not [p for p in folder.rglob("*") if p.suffix in (".png", ".jpg", ".webp", ".part")]


# --- weights -------------------------------------------------------------------------------------


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return damage


def header(change: Callable[[dict[str, Any]], str | None]) -> Callable[[Path], None]:
    """Change the JSON header of the transformer and leave its data."""

    def damage(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + length])
        text = (change(table) or json.dumps(table)).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return rewrite(TRANSFORMER, damage)


def tensors(
    name: str, change: Callable[[dict[str, torch.Tensor]], object]
) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name)

    return damage


def remove(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            place = folder / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()

    return damage


def to_pickle(folder: Path) -> None:
    (folder / TRANSFORMER).unlink()
    torch.save({}, folder / "transformer" / "diffusion_pytorch_model.bin")


def to_stable_diffusion(folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    (folder / "unet").mkdir()
    save_file(
        {"conv_in.weight": torch.zeros(4, 4)},
        folder / "unet" / "diffusion_pytorch_model.safetensors",
    )
    (folder / "unet" / "config.json").write_text("{}")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def shard(folder: Path) -> None:
    toys.write_diffusers(folder, max_shard_size="500KB")
    (folder / TRANSFORMER).unlink(missing_ok=True)


def missing_shard(folder: Path) -> None:
    shard(folder)
    next(iter((folder / "transformer").glob("*-00002-of-*"))).unlink()


def index_outside(folder: Path) -> None:
    shard(folder)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] = dict.fromkeys(table["weight_map"], "../../secret.safetensors")
    index.write_text(json.dumps(table))


def shards_of_two_releases(folder: Path) -> None:
    shard(folder)
    first, second, *_ = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    shutil.copy(first, second)


def config(name: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def first_shape(table: dict[str, Any], **changes: object) -> None:
    next(row for name, row in table.items() if name != "__metadata__").update(changes)


def overlap(table: dict[str, Any]) -> None:
    rows = [row for name, row in table.items() if name != "__metadata__"]
    rows[1]["data_offsets"] = rows[0]["data_offsets"]
    rows[1]["shape"], rows[1]["dtype"] = rows[0]["shape"], rows[0]["dtype"]


def fill(folder: Path) -> None:
    """Give the transformer the input of FLUX.1 Fill: 384 channels, of which 64 come out."""
    state = load_file(folder / TRANSFORMER)
    state["x_embedder.weight"] = torch.zeros(64, 384)
    save_file(state, folder / TRANSFORMER)


DAMAGE: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "cut by 100 bytes": (rewrite(TRANSFORMER, lambda data: data[:-100]), WEIGHTS, "cut short"),
    "cut in the header": (rewrite(TRANSFORMER, lambda data: data[:300]), WEIGHTS, "cut short"),
    "empty file": (rewrite(TRANSFORMER, lambda _: b""), WEIGHTS, "empty"),
    "seven bytes": (rewrite(TRANSFORMER, lambda _: b"1234567"), WEIGHTS, "empty or cut short"),
    "bytes behind the end": (rewrite(TRANSFORMER, lambda data: data + b"x"), WEIGHTS, "behind its last"),
    "LFS pointer": (
        rewrite(VAE, lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        WEIGHTS,
        "Git LFS pointer",
    ),
    "HTML page": (rewrite(T5, lambda _: b"<!DOCTYPE html><html>401</html>"), WEIGHTS, "web page"),
    "pickle only": (to_pickle, WEIGHTS, "pickle"),
    "pickle under another name": (rewrite(VAE, lambda _: b"PK\x03\x04" + b"0" * 64), WEIGHTS, "pickle"),
    "GGUF": (rewrite(TRANSFORMER, lambda _: b"GGUF" + b"\0" * 64), WEIGHTS, "GGUF"),
    "header is no JSON": (header(lambda _: "{nonsense"), WEIGHTS, "not valid JSON"),
    "header is a list": (header(lambda _: "[]"), WEIGHTS, "no table"),
    "header nested too deep": (header(lambda _: "[" * 100_000), WEIGHTS, "not valid JSON"),
    "header length 2^63": (
        rewrite(TRANSFORMER, lambda data: (2**63).to_bytes(8, "little") + data[8:]),
        WEIGHTS,
        "cut short, or is no safetensors",
    ),
    "unknown dtype": (header(lambda t: first_shape(t, dtype="F7")), WEIGHTS, "impossible tensor"),
    "negative shape": (header(lambda t: first_shape(t, shape=[-1])), WEIGHTS, "impossible tensor"),
    "offsets that overlap": (header(overlap), WEIGHTS, "overlap"),
    "name twice in the header": (
        header(lambda t: json.dumps(t)[:-1] + ', "proj_out.bias": 1}'), WEIGHTS, "appears twice",
    ),
    "missing shard": (missing_shard, WEIGHTS, "missing"),
    "shards of two releases": (shards_of_two_releases, WEIGHTS, "what their index says"),
    "index out of the folder": (index_outside, WEIGHTS, "outside its folder"),
    "missing tensor": (tensors(TRANSFORMER, lambda s: s.pop("proj_out.bias")), WEIGHTS, "1 missing: proj_out.bias"),
    "extra tensor": (
        tensors(TRANSFORMER, lambda s: s.update(lora=torch.zeros(1))), WEIGHTS, "1 unexpected: lora",
    ),
    "wrong shape": (
        tensors(VAE, lambda s: s.update({"decoder.conv_in.bias": torch.zeros(3)})),
        WEIGHTS,
        "decoder.conv_in.bias is (3,), not (64,)",
    ),
    "whole numbers for weights": (
        tensors(VAE, lambda s: s.update({"decoder.conv_in.bias": s["decoder.conv_in.bias"].char()})),
        WEIGHTS,
        "decoder.conv_in.bias is of dtype I8",
    ),
    "extra tensor in T5": (tensors(T5, lambda s: s.update(x=torch.zeros(1))), WEIGHTS, "unexpected: x"),
    "Fill": (fill, WEIGHTS, "FLUX.1 Fill"),
    "another model": (to_stable_diffusion, WEIGHTS, "StableDiffusionPipeline"),
    "no VAE": (remove("vae"), WEIGHTS, "has no vae"),
    "no transformer": (remove("transformer"), WEIGHTS, "has no transformer"),
    "no T5": (remove("text_encoder_2"), WEIGHTS, "has no text_encoder_2"),
    "no tokenizer": (remove("tokenizer"), WEIGHTS, "has no tokenizer"),
    "no weights in a component": (remove(VAE), WEIGHTS, "no weights file"),
    "no config": (remove("vae/config.json"), WEIGHTS, "config file is missing"),
    "config is no JSON": (rewrite("vae/config.json", lambda _: b"{"), WEIGHTS, "cannot be read"),
    "config is a list": (rewrite("vae/config.json", lambda _: b"[]"), WEIGHTS, "a list in place"),
    "config of another size": (config("transformer/config.json", num_layers=3), WEIGHTS, "num_layers is 3"),
    "config of nonsense": (
        config("transformer/config.json", num_layers="many"), WEIGHTS, "num_layers in the config of transformer",
    ),
    "VAE config of nonsense": (
        config("vae/config.json", block_out_channels=5), WEIGHTS, "block_out_channels in the config of vae",
    ),
    "guidance claimed, not there": (
        config("transformer/config.json", guidance_embeds=True), WEIGHTS, "guidance_embedder",
    ),
    "model index is no JSON": (rewrite("model_index.json", lambda _: b"?"), WEIGHTS, "cannot be read"),
    "tokenizer vocabulary damaged": (
        rewrite("tokenizer/vocab.json", lambda _: b"{"), WEIGHTS, "vocab.json of the tokenizer is not usable",
    ),
    "spiece.model damaged": (
        rewrite("tokenizer_2/spiece.model", lambda _: b"\xff" * 40), WEIGHTS, "spiece.model of the tokenizer_2 is not usable",
    ),
    "spiece.model missing": (remove("tokenizer_2/spiece.model"), WEIGHTS, "tokenizer_2"),
    "schedule of nonsense": (
        config("scheduler/scheduler_config.json", num_train_timesteps="x"), WEIGHTS, "num_train_timesteps in the config of scheduler",
    ),
    "vocabulary of another model": (
        rewrite("tokenizer/vocab.json", lambda data: data.replace(b": 513", b": 5130")),
        WEIGHTS,
        "the tokenizer is of another model than the text_encoder",
    ),
    "NaN in T5": (
        tensors(T5, lambda s: s["shared.weight"].fill_(float("nan"))), PICTURE, "in the stage encode",
    ),
    "NaN in the transformer": (
        tensors(TRANSFORMER, lambda s: s["proj_out.bias"].fill_(float("nan"))),
        PICTURE,
        "not finite: transformer: proj_out.bias",
    ),
    "infinity in the VAE": (
        tensors(VAE, lambda s: s["decoder.conv_in.bias"].fill_(float("inf"))),
        PICTURE,
        "in the stage decode",
    ),
    "black picture": (
        tensors(VAE, lambda s: (s["decoder.conv_out.weight"].zero_(), s["decoder.conv_out.bias"].fill_(-9))),
        PICTURE,
        "the picture is black",
    ),
    "flat picture": (
        tensors(VAE, lambda s: (s["decoder.conv_out.weight"].zero_(), s["decoder.conv_out.bias"].fill_(0.3))),
        PICTURE,
        "one flat colour",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights(case: str, schnell: Path, tmp_path: Path) -> None:
    damage, code, words = DAMAGE[case]
    folder = tmp_path / "model"
    shutil.copytree(schnell, folder)
    damage(folder)
    got, text = invoke("generate", "-m", folder, "a cat", "-o", tmp_path / "out.png", *QUICK)
    assert (got, words in text) == (code, True), text
    assert no_pictures(tmp_path)


def place_empty(folder: Path, _: Path) -> Path:
    folder.mkdir()
    return folder


def place_other(folder: Path, _: Path) -> Path:
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing here")
    return folder


def place_pickles(folder: Path, _: Path) -> Path:
    folder.mkdir()
    torch.save({}, folder / "flux1-schnell.pt")
    return folder


def place_two(folder: Path, bfl: Path) -> Path:
    shutil.copytree(bfl, folder)
    shutil.copy(folder / "flux1-toy.safetensors", folder / "flux1-other.safetensors")
    return folder


def place_without_encoders(folder: Path, bfl: Path) -> Path:
    folder.mkdir()
    shutil.copy(bfl / "flux1-toy.safetensors", folder)
    shutil.copy(bfl / "ae.safetensors", folder)
    return folder


def place_unknown_file(folder: Path, _: Path) -> Path:
    folder.mkdir()
    save_file({"layers.0.weight": torch.zeros(2)}, folder / "model.safetensors")
    return folder / "model.safetensors"


PLACES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "nothing there": (lambda folder, _: folder, "nothing at this path"),
    "empty folder": (place_empty, "empty"),
    "another folder": (place_other, "notes.txt"),
    "folder of pickles": (place_pickles, "pickle"),
    "two transformers": (place_two, "more than one transformer"),
    "BFL files without encoders": (place_without_encoders, "--component text_encoder=PLACE"),
    "only the autoencoder": (lambda _, bfl: bfl / "ae.safetensors", "only a vae"),
    "only a text encoder": (lambda _, bfl: bfl / "clip-toy", "nothing in this folder"),
    "a file of another model": (place_unknown_file, "no model danqing knows"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_without_a_model(case: str, schnell_bfl: Path, tmp_path: Path) -> None:
    make, words = PLACES[case]
    place = make(tmp_path / "model", schnell_bfl)
    got, text = invoke("generate", "-m", place, "a cat", "-o", tmp_path / "out.png", *QUICK)
    assert (got, words in text) == (WEIGHTS, True), text
    assert no_pictures(tmp_path)


def test_a_path_that_cannot_be() -> None:
    code, text = invoke("generate", "-m", "n" * 5000, "a cat", *QUICK)
    assert code == WEIGHTS
    assert "the path cannot be read" in text


def test_a_component_folder_names_its_parent(schnell: Path) -> None:
    code, text = invoke("generate", "-m", schnell / "vae", "a cat", *QUICK)
    assert code == WEIGHTS
    assert f"give the folder above it: {schnell}" in text


def test_a_hub_name_is_not_downloaded() -> None:
    code, text = invoke("generate", "-m", "black-forest-labs/FLUX.1-schnell", "a cat", *QUICK)
    assert code == WEIGHTS
    assert "not on this disk" in text


# --- requests ------------------------------------------------------------------------------------

NO_CARD = (
    "no cuda device with this number" if torch.cuda.is_available() else "cuda is not available"
)

REQUESTS: dict[str, tuple[list[str], int, str]] = {
    "no prompt": ([], REQUEST, "there is no prompt"),
    "empty prompt": ([""], REQUEST, "prompt is empty"),
    "blank prompt": (["  \t "], REQUEST, "prompt is empty"),
    "10,000 words": (["word " * 10_000], REQUEST, "10000 words"),
    "control character": (["a\x07cat"], REQUEST, "U+0007 at position 1"),
    "lone surrogate": (["a \udc80 cat"], REQUEST, "U+DC80"),
    "size 0": (["x", "--size", "0x0"], REQUEST, "whole numbers from 8 to 16384"),
    "size 100001": (["x", "--size", "100001x100001"], REQUEST, "8 to 16384"),
    "size of words": (["x", "--size", "big"], REQUEST, "WIDTHxHEIGHT"),
    "negative height": (["x", "--height", "-5"], REQUEST, "height is out of range"),
    "fractional width": (["x", "--width", "5.5"], REQUEST, "--width"),
    "size against height": (["x", "--size", "64x64", "--height", "32"], REQUEST, "contradict"),
    "no steps": (["x", "--steps", "0"], REQUEST, "1 to 1000"),
    "negative steps": (["x", "--num_inference_steps", "-4"], REQUEST, "num_inference_steps"),
    "too many steps": (["x", "--steps", "100000"], REQUEST, "1 to 1000"),
    "seed 2^64": (["x", "--seed", str(2**64)], REQUEST, "0 to 18446744073709551615"),
    "negative seed": (["x", "--seed", "-1"], REQUEST, "seed is out of range"),
    "last seed beyond the end": (
        ["x", "--seed", str(2**64 - 1), "--num-images", "2"], REQUEST, "last picture's seed",
    ),
    "no pictures": (["x", "--num-images", "0"], REQUEST, "num_images_per_prompt"),
    "no batch": (["x", "--batch", "0"], REQUEST, "1 to 64"),
    "a batch of one": (["x", "--batch", "2"], REQUEST, "--batch has no effect"),
    "--loop in a dry run": (["--loop", "--dry-run"], REQUEST, "--loop has no effect"),
    "guidance in schnell": (["x", "--guidance_scale", "4.0"], REQUEST, "no guidance embedder"),
    "guidance nan": (["x", "--guidance", "nan"], REQUEST, "guidance_scale"),
    "negative prompt": (["x", "--negative-prompt", "blur"], REQUEST, "no effect"),
    "no tokens": (["x", "--max-sequence-length", "0"], REQUEST, "max_sequence_length"),
    "513 tokens": (["x", "--max-sequence-length", "513"], REQUEST, "1 to 512"),
    "unknown option": (["x", "--sharpness", "3"], REQUEST, "--sharpness"),
    "unknown dtype": (["x", "--dtype", "int3"], DEVICE, "unknown dtype"),
    "unknown device": (["x", "--device", "tpu"], DEVICE, "unknown device"),
    "odd device": (["x", "--device", "cuda:one"], DEVICE, "unknown device"),
    "second processor": (["x", "--device", "cpu:1"], DEVICE, "no cpu device with this number"),
    "NPU without torch_npu": (["x", "--device", "npu"], DEVICE, "torch_npu is not installed"),
    "CUDA that is not there": (["x", "--device", "cuda:999"], DEVICE, NO_CARD),
    "prompts file missing": (["--prompts-file", "nowhere.txt"], REQUEST, "cannot be read"),
    "component without place": (["x", "--component", "t5"], REQUEST, "NAME=PATH"),
    "unknown component": (["x", "--component", "unet=x"], REQUEST, "unknown component"),
    "component not there": (["x", "--component", "vae=nowhere"], WEIGHTS, "place of vae"),
    "suffix": (["x", "-o", "picture.gif"], REQUEST, ".png .jpg .jpeg .webp"),
    "no suffix": (["x", "-o", "picture"], REQUEST, "suffix"),
    "unknown field": (["x", "-o", "{prompt}.png"], REQUEST, "{seed} {index} {model}"),
    "unbalanced brace": (["x", "-o", "{seed.png"], REQUEST, "brace"),
    "--from with a prompt": (["x", "--from", "a.png"], REQUEST, "takes its prompt from"),
    "--from nothing": (["--from", "nowhere.png"], OUTPUT, "image not found"),
}  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS)
def test_bad_requests(
    case: str, schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, code, words = REQUESTS[case]
    monkeypatch.chdir(tmp_path)
    got, text = invoke("generate", "-m", schnell, "-q", *arguments)
    assert (got, words in text) == (code, True), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x", "colour": 1}', "unknown setting 'colour'"),
        ('{"prompt": "x", "height": "tall"}', "invalid height"),
        ('{"prompt": "x"', "begins like a JSON object"),
        ('{"height": 64}', "prompt is missing"),
        ('{"prompt": ""}', "prompt is empty"),
    ],
)
def test_prompts_file_names_the_line(line: str, words: str, schnell: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"a cat\n\n{line}\n")
    code, text = invoke("generate", "-m", schnell, "--prompts-file", file, *QUICK)
    assert code == REQUEST
    assert words in text
    assert "line 3" in text


def test_prompts_file_that_is_no_text(schnell: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_bytes(b"\xff\xfe\x00\x80")
    code, text = invoke("generate", "-m", schnell, "--prompts-file", tmp_path / "prompts", *QUICK)
    assert code == REQUEST
    assert "cannot be read" in text


def test_no_prompt() -> None:
    code, text = invoke("generate")
    assert code == REQUEST
    assert "there is no prompt" in text


def test_a_component_of_the_wrong_kind(schnell: Path) -> None:
    arguments = ("--component", f"vae={schnell / 'text_encoder'}")
    code, text = invoke("generate", "-m", schnell, "a cat", *arguments, *QUICK)
    assert code == WEIGHTS
    assert "this is no vae" in text


def test_encoders_of_another_size(schnell: Path, tmp_path: Path) -> None:
    """A T5 or CLIP of the wrong width is a sound checkpoint, and is told before it is run."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    CLIPTextModel(CLIPTextConfig(**{**toys.CLIP, "hidden_size": 64})).save_pretrained(
        tmp_path / "clip"
    )
    T5EncoderModel(T5Config(**{**toys.T5, "d_model": 64})).save_pretrained(tmp_path / "t5")
    for name in ("clip", "t5"):
        place = ("--component", f"{name}={tmp_path / name}")
        code, text = invoke("generate", "-m", schnell, "a cat", *place, *QUICK)
        assert code == WEIGHTS
        assert "is not the one this transformer was trained with" in text


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/sys/danqing.png", "/proc/danqing/x.png", "/dev/null/x.png"])
def test_folders_that_cannot_be_written(place: str, schnell: Path) -> None:
    """Said before the work; these refuse even the superuser, as a read-only disk does."""
    code, text = invoke("generate", "-m", schnell, "a cat", "-o", place, *QUICK)
    assert code == OUTPUT, text


def test_output_names_that_cannot_be(schnell: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("folder.png", "file/x.png", "n" * 300 + ".png"):
        code, text = invoke("generate", "-m", schnell, "a cat", "-o", tmp_path / name, *QUICK)
        assert code == OUTPUT, text
        assert no_pictures(tmp_path / "folder.png")


def test_pictures_without_a_record(schnell: Path, tmp_path: Path) -> None:
    from PIL import Image

    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(plain.read_bytes()[:20])
    for name, words in (
        ("plain", "carries no danqing record"),
        ("text", "not a whole"),
        ("cut", "not a whole"),
    ):
        for command in (("show",), ("generate", "--from")):
            code, text = invoke(*command, tmp_path / f"{name}.png")
            assert code == OUTPUT
            assert words in text


SPOILED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no provenance": lambda r: r.pop("provenance"),
    "provenance is text": lambda r: r.update(provenance="danqing"),
    "components are a list": lambda r: r["provenance"]["model"].update(components=["vae"]),
    "position is text": lambda r: r["provenance"]["batch"].update(position="first"),
    "position before the first": lambda r: r["provenance"]["batch"].update(position=10**30),
    "an empty batch": lambda r: r["provenance"]["batch"].update(size=0),
    "a batch of a million": lambda r: r["provenance"]["batch"].update(size=10**6),
    "device is a number": lambda r: r["options"].update(device=7),
    "device is not here": lambda r: r["options"].update(device="npu:7"),
    "an unknown option": lambda r: r["options"].update(colour="red"),
    "a memory of nothing": lambda r: r["options"].update(memory=0),
    "an older device is a number": lambda r: (
        r.pop("options"),
        r["provenance"]["device"].update(name=7),
    ),
    "path is nothing": lambda r: r["provenance"]["model"].update(path=None),
    "another schema": lambda r: r.update(schema=99),
    "an unknown setting": lambda r: r["request"].update(colour="red"),
    "a prompt of nothing": lambda r: r["request"].update(prompt=None),
}


@pytest.fixture(scope="module")
def painted(schnell: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("painted") / "a.png"
    assert invoke("generate", "-m", schnell, "a cat", "-o", target, *QUICK)[0] == 0
    return target


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_records(case: str, painted: Path, tmp_path: Path) -> None:
    """A record comes from a file that anybody may have written."""
    from PIL import Image

    from danqing import pictures

    record = pictures.read_record(painted)
    SPOILED[case](record)
    spoiled = pictures.save(Image.open(painted), record, tmp_path / "spoiled.png")
    arguments = ("-q", "--dtype", "float32", "-o", tmp_path / "again.png", "--trust")
    code, text = invoke("generate", "--from", spoiled, *arguments)
    # a device that is not here is no fault of the record: the picture is made elsewhere
    elsewhere = case == "device is not here"
    assert code == 0 if elsewhere else code in (REQUEST, WEIGHTS, OUTPUT), text
    assert invoke("show", spoiled)[0] == 0


def test_a_batch_for_a_picture_that_has_its_own(painted: Path) -> None:
    code, text = invoke("generate", "--from", painted, "--batch", 2, "--trust")
    assert code == REQUEST
    assert "in a batch as large as its own" in text


def test_unusual_prompts_that_are_fine(schnell: Path, tmp_path: Path) -> None:
    for number, prompt in enumerate(("🍕🐉", "一只猫", "a\ncat\tand", "'; DROP TABLE --", "-v")):
        arguments = ("-o", tmp_path / f"{number}.png", "--prompt", prompt)
        code, text = invoke("generate", "-m", schnell, *arguments, *QUICK)
        assert code == 0
        assert not text or "not in this model's vocabulary" in text
        assert (tmp_path / f"{number}.png").exists()
