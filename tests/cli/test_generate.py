"""`danqing generate` as people type it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from danqing.cli import app
from tests import sparse, toys

if TYPE_CHECKING:
    from pathlib import Path


SMALL = ("--size", "64x64", "--device", "cpu")


def invoke(*arguments: object, stdin: str | None = None, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.stderr
    return result


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pixels(path: str | Path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


def test_the_command_line_of_the_field_verbatim(dev: Path, tmp_path: Path) -> None:
    command = (
        'generate --model_path DIR --prompt "a photo of a blue pizza" --output_image output.png '
        "--height 512 --width 512 --seed 42 --num_inference_steps 50 --guidance_scale 4.0 --device cpu"
    )
    words = command.replace('"a photo of a blue pizza"', "PROMPT").split()
    words = [
        {"DIR": str(dev), "PROMPT": "a photo of a blue pizza"}.get(word, word) for word in words
    ]
    assert invoke(*words).stdout == "output.png\n"
    record = json.loads(invoke("show", "output.png", "--json").stdout)
    assert Image.open("output.png").size == (512, 512)
    request = record["request"]
    assert (request["seed"], request["num_inference_steps"], request["guidance_scale"]) == (
        42,
        50,
        4.0,
    )


def test_dashes_and_underscores_are_one(schnell: Path) -> None:
    a = ("--model_path", schnell, "--num_inference_steps", 2, "--output_image", "a.png")
    b = ("--model-path", schnell, "--num-inference-steps", 2, "--output-image", "b.png")
    c = ("-m", schnell, "--steps", 2, "-o", "c.png")
    for arguments in (a, b, c):
        invoke("generate", "a cat", *arguments, "--seed", 1, *SMALL)
    assert pixels("a.png") == pixels("b.png") == pixels("c.png")


def test_size_is_width_by_height(schnell: Path) -> None:
    invoke("generate", "a cat", "-m", schnell, "--size", "96x64", "-o", "a.png", "--device", "cpu")
    assert Image.open("a.png").size == (96, 64)


def test_a_size_that_is_no_multiple_of_16_is_rounded_and_said(schnell: Path) -> None:
    arguments = ("-m", schnell, "--size", "70x95", "-o", "a.png", "--device", "cpu")
    text = invoke("generate", "a cat", *arguments).stderr
    assert Image.open("a.png").size == (64, 80)
    assert "note: width 70 is no multiple of 16: 64 is used" in text


def test_names_never_overwrite(schnell: Path, tmp_path: Path) -> None:
    for expected in ("out.png", "out-1.png", "out-2.png"):
        arguments = ("-m", schnell, "-o", "out.png", *SMALL)
        assert invoke("generate", "a cat", *arguments).stdout == f"{expected}\n"
    before = pixels("out.png")
    again = ("-m", schnell, "-o", "out.png", "--overwrite", "--seed", 9, *SMALL)
    assert invoke("generate", "a dog", *again).stdout == "out.png\n"
    assert pixels("out.png") != before
    assert len(list(tmp_path.iterdir())) == 3


def test_names_from_a_template(schnell: Path, tmp_path: Path) -> None:
    arguments = ("-m", schnell, "--seed", 7, "--num-images", 2, *SMALL)
    out = invoke("generate", "a cat", "-o", "new/{model}_{seed}_{index}.png", *arguments).stdout
    assert out.split() == ["new/flux1-schnell_7_0.png", "new/flux1-schnell_8_1.png"]
    assert invoke("generate", "a cat", *arguments).stdout.split() == [
        "flux1-schnell-7.png",
        "flux1-schnell-8.png",
    ]


def test_several_prompts_from_everywhere(schnell: Path, tmp_path: Path) -> None:
    lines = [
        "a boat",
        "",
        json.dumps({"prompt": "a sun", "seed": 5, "height": 80, "output_image": "sun.png"}),
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), "utf-8")
    arguments = ("one", "two", "--prompt", "three", "--prompts-file", "prompts.txt", "--seed", 1)
    result = invoke(
        "generate", *arguments, "-m", schnell, "--width", 64, "--height", 64, "--json", "-q"
    )
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["request"]["prompt"] for r in records] == ["one", "two", "three", "a boat", "a sun"]
    assert [r["request"]["seed"] for r in records] == [1, 1, 1, 1, 5]
    assert records[-1]["file"] == "sun.png"
    assert Image.open("sun.png").size == (64, 80)


def test_prompts_from_standard_input(schnell: Path) -> None:
    arguments = ("--prompts-file", "-", "-m", schnell, *SMALL)
    assert len(invoke("generate", *arguments, stdin="a cat\na dog\n").stdout.split()) == 2


def test_json_is_one_record_a_picture_and_progress_is_elsewhere(schnell: Path) -> None:
    result = invoke("generate", "a cat", "-m", schnell, "--num-images", 2, "--json", *SMALL)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(records) == 2
    for index, record in enumerate(records):
        assert record["picture"]["index"] == index
        assert {stage["name"] for stage in record["stages"]} >= {"encode", "denoise", "decode"}
        assert all(stage["seconds"] > 0 for stage in record["stages"])
        assert record["provenance"]["device"]["name"] == "cpu"
        assert len(record["provenance"]["noise_sha256"]) == 64
    assert "denoise picture 0: step 4 of 4" in result.stderr
    assert "load transformer" in result.stderr


def test_quiet_says_nothing(schnell: Path) -> None:
    result = invoke("generate", "a cat", "-m", schnell, "-q", "-o", "a.png", *SMALL)
    assert (result.stdout, result.stderr) == ("a.png\n", "")


def test_a_dry_run_touches_no_weights_and_writes_nothing(tmp_path: Path) -> None:
    """A whole FLUX.1-dev of real size, of which only the headers exist."""
    folder = sparse.write_real_size(tmp_path / "flux", guided=True)
    toys.write_clip_tokenizer(folder / "clip")
    toys.write_t5_tokenizer(folder / "t5")
    before = sorted(tmp_path.rglob("*"))
    arguments = (
        "-m", folder, "--dry-run", "--size", "1000x500", "--dtype", "bfloat16", "--memory", "8GiB",
    )  # fmt: skip
    result = invoke("generate", "a cat", *arguments, "--device", "cpu", "--json")
    row = json.loads(result.stdout)
    assert row["request"]["height"] == 496
    assert row["request"]["guidance_scale"] == 3.5
    assert row["request"]["num_inference_steps"] == 50
    assert row["notes"] == [
        "height 500 is no multiple of 16: 496 is used",
        "width 1000 is no multiple of 16: 992 is used",
    ]
    sizes = {part["name"]: part["bytes"] for part in row["plan"]["components"]}
    assert sizes["transformer"] == 2 * 11_901_408_320
    assert sizes["text_encoder_2"] == 2 * 4_762_310_656
    assert "shifted by resolution" in row["plan"]["assumptions"][0]
    assert row["plan"]["placement"] == "streamed"
    assert "resident would take 3" in row["plan"]["placement_reason"]
    assert row["plan"]["limit_bytes"] == 8 * 2**30 >= max(row["plan"]["peak_bytes"].values())
    assert sorted(tmp_path.rglob("*")) == before
    assert (
        "would paint 992x496, 50 steps, seed random, guidance 3.5"
        in invoke("generate", "a cat", *arguments).stdout
    )


def test_the_plan_is_printed_first_with_reasons(schnell: Path) -> None:
    text = invoke("generate", "a cat", "-m", schnell, "--size", "64x64").stderr
    plan, _, rest = text.partition("load text_encoder")
    assert "FLUX.1-schnell, diffusers folder" in plan
    assert "auto: the best one here (no cuda, no npu, no xpu, no mps)" in plan or "cuda:0" in plan
    assert "float32: the transformer is stored so" in plan
    assert "resident: " in plan
    assert rest


def test_loop_keeps_the_model_and_obeys_commands(schnell: Path) -> None:
    talk = "a cat\n/seed 7\n/size 96x64\n/steps 2\na dog\n\n/nonsense\n/seed -\n/seed x\n/guidance 3\n/show\n/help\n/quit\nnever\n"
    arguments = ("-m", schnell, "--loop", "--seed", 1, "-o", "l.png", *SMALL)
    result = invoke("generate", *arguments, stdin=talk)
    assert result.stdout.split() == ["l.png", "l-1.png", "l-2.png"]
    assert Image.open("l.png").size == (64, 64)
    assert Image.open("l-1.png").size == (96, 64)
    assert pixels("l-1.png") == pixels("l-2.png")
    for words in (
        "unknown command", "seed cannot be read", "no guidance embedder",
        "96x64, 2 steps, seed 7", "/output NAME",
    ):  # fmt: skip
        assert words in result.stderr
    assert result.stderr.count("load transformer") == 1
    alone = ("--seed", 7, "--size", "96x64", "--steps", 2, "-o", "alone.png", "--device", "cpu")
    invoke("generate", "a dog", "-m", schnell, *alone)
    assert pixels("alone.png") == pixels("l-1.png")


def test_loop_paints_what_the_command_line_asks_first(schnell: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("a boat\n")
    arguments = ("a cat", "--prompts-file", "prompts", "-m", schnell, "--loop", "--json", "-q")
    result = invoke("generate", *arguments, "--seed", 1, *SMALL, stdin="\na dog\n")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["request"]["prompt"] for r in records] == ["a cat", "a boat", "a cat", "a dog"]


def test_from_makes_the_same_picture_again(schnell: Path, dev: Path) -> None:
    invoke(
        "generate",
        "a cat",
        "-m",
        schnell,
        "--num-images",
        3,
        "--seed",
        3,
        "-o",
        "p-{seed}.png",
        *SMALL,
    )
    result = invoke("generate", "--from", "p-5.png", "--trust", "-o", "again.png", "--json")
    assert json.loads(result.stdout)["identical"] is True
    assert "the same picture, bit for bit" in result.stderr
    assert pixels("again.png") == pixels("p-5.png")
    changed = invoke(
        "generate", "--from", "p-5.png", "-m", schnell, "--steps", 2, "-o", "two.png", "--json"
    )
    record = json.loads(changed.stdout)
    assert record["request"]["num_inference_steps"] == 2
    assert "identical" not in record
    text = invoke("generate", "--from", "p-5.png", "-m", dev, "--dtype", "float32", code=3).stderr
    assert "these are not the weights" in text


def test_from_makes_a_picture_of_a_batch_again(dev: Path, tmp_path: Path) -> None:
    arguments = ("a cat", "-m", dev, "--seed", 1, "--steps", 2, "--num-images", 5, "--batch", 3)
    invoke("generate", *arguments, "-o", "{index}.png", *SMALL)
    for index in range(5):
        result = invoke(
            "generate",
            "--from",
            f"{index}.png",
            "--trust",
            "-o",
            "again.png",
            "--overwrite",
            "--json",
        )
        [line] = result.stdout.splitlines()
        assert json.loads(line)["identical"] is True
        assert json.loads(line)["request"]["seed"] == 1 + index


def test_from_with_changes_is_an_ordinary_request(dev: Path) -> None:
    invoke("generate", "a cat", "-m", dev, "--seed", 1, "--steps", 2, "-o", "a.png", *SMALL)
    arguments = ("--num-images", 2, "--batch", 2, "-o", "b-{index}.png", "--json")
    lines = invoke("generate", "--from", "a.png", "-m", dev, *arguments).stdout.splitlines()
    assert [json.loads(line)["provenance"]["batch"]["size"] for line in lines] == [2, 2]
    assert [json.loads(line)["request"]["seed"] for line in lines] == [1, 2]


def test_from_says_when_the_pixels_differ(schnell: Path, tmp_path: Path) -> None:
    invoke("generate", "a cat", "-m", schnell, "--dtype", "bfloat16", "-o", "a.png", *SMALL)
    text = invoke(
        "generate", "--from", "a.png", "-m", schnell, "--dtype", "float32", "-o", "b.png"
    ).stderr
    assert "the pixels differ from the original" in text


def test_from_finds_components_again(schnell_bfl: Path, schnell: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(schnell_bfl / "flux1-toy.safetensors", folder)
    places = {
        "vae": schnell_bfl / "ae.safetensors",
        "t5": schnell_bfl / "t5-v1_1-toy",
        "clip": schnell_bfl / "clip-toy",
    }
    options = [
        word for name, place in places.items() for word in ("--component", f"{name}={place}")
    ]
    invoke("generate", "a cat", "-m", folder, *options, "-o", "a.png", "--seed", 2, *SMALL)
    assert (
        json.loads(invoke("generate", "--from", "a.png", "--trust", "--json").stdout)["identical"]
        is True
    )
    invoke("generate", "a cat", "-m", schnell, "-o", "b.png", "--seed", 2, *SMALL)
    assert pixels("a.png") == pixels("b.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp"])
def test_every_format_carries_the_record_and_the_mark(schnell: Path, suffix: str) -> None:
    prompt = '一艘船 ⛵ on the "water" & <mist>'
    invoke("generate", prompt, "-m", schnell, "-o", f"a.{suffix}", "--seed", 2**64 - 1, *SMALL)
    record = json.loads(invoke("show", f"a.{suffix}", "--json").stdout)
    assert record["request"]["prompt"] == prompt
    assert record["request"]["seed"] == 2**64 - 1
    assert record["ai_generated"] is True
    image = Image.open(f"a.{suffix}")
    assert "AI-generated" in image.getexif()[0x0131]
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    assert "trainedAlgorithmicMedia" in str(xmp)
    if suffix == "png":
        assert json.loads(image.info["danqing"]) == record
    assert json.loads(
        invoke("generate", "--from", f"a.{suffix}", "--trust", "-o", "b.png", "--json").stdout
    )["identical"]


def test_the_longest_prompt_fits_into_every_format(schnell: Path) -> None:
    prompt = "🐉" * 8000
    for suffix in ("png", "jpg", "webp"):
        invoke("generate", prompt, "-m", schnell, "-o", f"a.{suffix}", *SMALL)
        assert (
            json.loads(invoke("show", f"a.{suffix}", "--json").stdout)["request"]["prompt"]
            == prompt
        )


def test_a_prompt_that_is_cut_is_said(schnell: Path) -> None:
    prompt = "a cat and " * 100 + "the very end"
    text = invoke("generate", prompt, "-m", schnell, "-o", "a.png", *SMALL).stderr
    assert "and only 256 are read; not read: " in text
    assert "the very end" in text
    text = invoke("generate", "a cat", "-m", schnell, "-o", "b.png", *SMALL).stderr
    assert "not read" not in text


def test_a_prompt_alone_is_the_same_as_among_others(schnell: Path) -> None:
    invoke("generate", "a dog", "-m", schnell, "--seed", 4, "-o", "alone.png", *SMALL)
    invoke(
        "generate", "a cat", "a dog", "a boat", "-m", schnell, "--seed", 4, "-o", "many.png", *SMALL
    )
    assert pixels("many-1.png") == pixels("alone.png")


def test_a_seed_left_out_is_random_and_recorded(schnell: Path) -> None:
    seeds = set()
    for _ in range(2):
        result = invoke("generate", "a cat", "-m", schnell, "--json", *SMALL)
        seeds.add(json.loads(result.stdout)["request"]["seed"])
    assert len(seeds) == 2


def test_batch_says_what_it_does_to_the_bits(dev: Path) -> None:
    arguments = ("a cat", "-m", dev, "--seed", 1, "--steps", 2, *SMALL)
    invoke("generate", *arguments, "--num-images", 3, "-o", "one-{index}.png")
    result = invoke(
        "generate", *arguments, "--num-images", 3, "--batch", 2, "-o", "two-{index}.png", "--json"
    )
    finding = json.loads(result.stdout.splitlines()[0])["provenance"]["batch"]
    assert finding["size"] == 2
    assert result.stderr.count("note: batch 2 is") == 1
    alone, together = (
        np.asarray(Image.open(f"{name}-1.png"), dtype=int) for name in ("one", "two")
    )
    assert np.abs(alone - together).max() == finding["max_pixel_difference"]
    assert finding["bits"] == ("close" if finding["max_pixel_difference"] else "identical")
    assert pixels("one-2.png") == pixels("two-2.png")  # the last one was alone in both


def test_show_prints_what_was_asked(schnell: Path) -> None:
    invoke("generate", "a cat", "-m", schnell, "-o", "a.png", "--seed", 11, *SMALL)
    text = invoke("show", "a.png").stdout
    assert "request.prompt" in text
    assert "a cat" in text
    assert "11" in text


def test_version_and_help() -> None:
    assert invoke("--version").stdout.startswith("danqing ")
    assert "generate" in invoke("--help").stdout
