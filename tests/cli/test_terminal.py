"""Nothing from outside controls the terminal, and output that cannot be written is an error."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from danqing import pictures
from danqing.cli import app
from tests.cli.test_bad_input import TRANSFORMER, header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NIGHT = Path(__file__).parents[2] / "docs" / "pictures" / "night.png"
HOSTILE = "x\x1b]0;owned\x07\x1b[2J\x9b2J\x85\u202egnp\u2066y"
NAME = HOSTILE.replace("/", "")


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command; nothing printed may control a terminal."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    for text in (result.stdout, result.stderr):
        controls = [
            letter
            for letter in text
            if letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Cf", "Cs")
        ]
        assert not controls, (arguments, controls, text[:2000])
    assert "this is a bug" not in result.stderr, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.exit_code, result.stdout, result.stderr


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each field of a record that is not a table or a list."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, (dict, list)) and inner:
            yield from fields(inner, (*path, key))
        else:
            yield (*path, key)


def changed(record: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    """Return a copy of a record with another value in a field."""
    record = copy.deepcopy(record)
    place: Any = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return record


def image_with(record: Any, place: Path) -> Path:
    """Write an image with a record, of control characters too."""
    return pictures.save(Image.new("RGB", (8, 8)), record, place, overwrite=True)


RECORD = pictures.read_record(NIGHT)
FIELDS = [*fields(RECORD)]


@pytest.mark.finding(9)
@pytest.mark.parametrize("field", FIELDS, ids=lambda field: ".".join(map(str, field)))
def test_a_hostile_field_of_a_record_is_escaped(field: tuple[Any, ...], tmp_path: Path) -> None:
    record = changed(RECORD, field, HOSTILE)
    image = image_with(record, tmp_path / "image.png")
    code, shown, _ = run("show", image)
    assert code == 0
    assert "\\x1b]0;owned\\x07" in shown
    assert json.loads(run("show", image, "--json")[1]) == record
    # no model has this fingerprint, so that no image is made
    record = changed(record, ("provenance", "model", "components"), {NAME: HOSTILE})
    record = changed(record, ("provenance", "model", "fingerprint"), HOSTILE)
    record = changed(record, ("provenance", "model", "path"), f"/nowhere/{HOSTILE}")
    code, _, text = run("generate", "--from", image_with(record, image))
    assert code in (2, 7), text


@pytest.mark.finding(9)
def test_hostile_names_in_a_record_are_escaped(tmp_path: Path) -> None:
    record = {**RECORD, HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: 1}]}, "fake\nrow": "a\nb"}
    image = image_with(record, tmp_path / "image.png")
    _, shown, _ = run("show", image)
    assert "\nrow" not in shown
    assert "\nb" not in shown
    assert json.loads(run("show", image, "--json")[1]) == record


def a_tensor(folder: Path) -> tuple[object, ...]:
    header(lambda table: json.dumps({**table, HOSTILE: table["proj_out.bias"]}))(folder)
    return ("check", folder)


def a_tensor_out_of_range(folder: Path) -> tuple[object, ...]:
    row = {"dtype": HOSTILE, "shape": [1], "data_offsets": [0, 4]}
    header(lambda table: json.dumps({**table, HOSTILE: row}))(folder)
    return ("generate", "a cat", "-m", folder)


def a_shard(folder: Path) -> tuple[object, ...]:
    index = {"weight_map": {"proj_out.bias": f"{NAME}.safetensors"}}
    (folder / TRANSFORMER).unlink()
    place = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    place.write_text(json.dumps(index))
    return ("check", folder)


def a_pickle(folder: Path) -> tuple[object, ...]:
    torch.save({HOSTILE: torch.zeros(2)}, folder / "model.pt")
    return ("check", folder / "model.pt", "--allow-pt")


def a_gguf(folder: Path) -> tuple[object, ...]:
    import gguf

    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, "flux")
    writer.add_tensor(HOSTILE, torch.zeros(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ("check", file)


def a_folder(folder: Path) -> tuple[object, ...]:
    target = folder.with_name(NAME)
    shutil.copytree(folder, target)
    (target / TRANSFORMER).unlink()
    return ("check", target)


def a_model_class(folder: Path) -> tuple[object, ...]:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": HOSTILE}))
    shutil.rmtree(folder / "transformer")
    return ("check", folder)


def a_config(folder: Path) -> tuple[object, ...]:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": HOSTILE}))
    return ("check", folder)


def a_file_beside(folder: Path) -> tuple[object, ...]:
    place = folder / "models"
    place.mkdir()
    save_file({HOSTILE: torch.zeros(2)}, place / f"{NAME}.safetensors")
    os.environ["DANQING_MODELS"] = str(place)
    return ("models", "--all")


def an_output(folder: Path) -> tuple[object, ...]:
    return ("generate", "a cat", "-o", folder / NAME / f"{NAME}.gif")


def an_image(folder: Path) -> tuple[object, ...]:
    return ("show", folder / f"{NAME}.png")


def a_prompt(folder: Path) -> tuple[object, ...]:
    return ("generate", "a \u202ecat\u2066", "--dry-run", "-m", folder, "--device", "cpu")


def a_prompts_file(folder: Path) -> tuple[object, ...]:
    file = folder / "prompts"
    file.write_text(json.dumps({"prompt": HOSTILE, HOSTILE: HOSTILE}, ensure_ascii=False))
    return ("generate", "--prompts-file", file)


def an_option(folder: Path) -> tuple[object, ...]:
    return ("generate", "a cat", f"--{NAME}", "--component", HOSTILE)


def a_trace(folder: Path) -> tuple[object, ...]:
    from danqing.arrays import Array
    from danqing.verify.trace import Recorder

    with Recorder(folder / "one.trace") as recorder:
        recorder(HOSTILE, Array("float32", torch.zeros(4).numpy().view("uint32")))
    recorder = Recorder(folder / "one.trace")
    with recorder:
        recorder(HOSTILE, Array("float32", torch.zeros(4).numpy().view("uint32")))
        record = changed(RECORD, ("provenance", "model", "title"), HOSTILE)
        record = changed(record, ("provenance", "device", "chip"), HOSTILE)
        recorder.finish({**record, HOSTILE: HOSTILE})
    return ("verify", "traces", folder / "one.trace", folder / "one.trace")


NAMES: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "tensor": a_tensor,
    "tensor that cannot be": a_tensor_out_of_range,
    "shard": a_shard,
    "pickle": a_pickle,
    "GGUF": a_gguf,
    "folder": a_folder,
    "model class": a_model_class,
    "config": a_config,
    "file beside models": a_file_beside,
    "output": an_output,
    "image": an_image,
    "prompt": a_prompt,
    "prompts file": a_prompts_file,
    "option": an_option,
    "trace": a_trace,
}


@pytest.mark.parametrize(
    "case",
    [
        # a config's and a prompt's were shown by repr before, too
        pytest.param(name, marks=[] if name in ("config", "prompt") else pytest.mark.finding(9))
        for name in NAMES
    ],
)
def test_a_hostile_name_is_escaped(
    case: str, schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANQING_MODELS", "")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(schnell, folder)
    command = NAMES[case](folder)
    _, out, errors = run(*command)
    assert "\\" in out + errors or "owned" not in out + errors
    if command[0] in ("check", "models"):
        out = run(*command, "--json")[1]
        assert not out or json.loads(out)


@pytest.mark.finding(9)
def test_an_error_cannot_forge_a_line(tmp_path: Path) -> None:
    _, _, text = run("show", tmp_path / "a\ndanqing: error: forged\n    \n")
    assert not [line for line in text.splitlines()[1:] if line.startswith("danqing")]


def test_json_that_is_escaped_is_the_same_value() -> None:
    from danqing.escaping import escape_json

    value = {HOSTILE: [HOSTILE, "三座蓝山 👩‍🎨", "\U000e0041\ud800\x7f\u2028"]}
    text = escape_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert "三座蓝山 👩‍🎨" in text
    assert not [x for x in text if unicodedata.category(x) in ("Cc", "Cs")]


# --- output that cannot be written ---------------------------------------------------------------

COMMANDS = (
    ("--help",),
    ("--version",),
    ("generate", "--help"),
    ("show", str(NIGHT)),
    ("show", str(NIGHT), "--json"),
    ("models", "--json"),
    ("eval-set", "--list"),
)
SLOW_COMMANDS = (
    ("check", "pocket"),
    ("plan",),
    ("doctor",),
    ("generate", "a cat", "--dry-run", "--json"),
    ("generate", "a cat", "-o", "out.png", "--json"),
)


def shell(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "danqing", *arguments))
    command = f"set -o pipefail; {words} {redirection}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.finding(11)
@pytest.mark.parametrize(
    "command", [*COMMANDS, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW_COMMANDS)], ids=" ".join
)  # fmt: skip
def test_output_that_cannot_be_written(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for redirection, code in ((">/dev/full", 7), (">&-", 7), ("| true", 141)):
        done = shell(redirection, *command)
        assert done.returncode == code, (redirection, done.stderr)
        assert "bug" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert ("cannot be written" in done.stderr) == (code == 7)


@pytest.mark.finding(11)
def test_errors_that_cannot_be_printed_keep_their_code(tmp_path: Path) -> None:
    for redirection in ("2>/dev/full", "2>&-", ">&- 2>&- <&-"):
        assert shell(redirection, "show", str(tmp_path / "nowhere.png")).returncode == 7
        assert shell(redirection, "generate", "--nonsense").returncode == 2


def test_an_ascii_terminal_gets_escapes(tmp_path: Path) -> None:
    record = changed(RECORD, ("request", "prompt"), "三座蓝山")
    image = image_with(record, tmp_path / "image.png")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "danqing", "show", image],
        capture_output=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"\u4e09" in done.stdout
