"""Every command takes every option that makes sense for it, and refuses the others by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from danqing import models, pictures
from danqing.cli import app
from danqing.cli.commands import CHECKS, COMMANDS
from danqing.cli.options import arguments, flags
from danqing.errors import DanqingError
from danqing.options import LOCAL, Options

if TYPE_CHECKING:
    from collections.abc import Iterator

GALLERY = Path(__file__).parents[2] / "docs" / "pictures"
VALUES: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "placement": "staged", "memory": "3GiB", "tile": "64",
    "quantize": "int8", "attention": "math", "deterministic": True, "compile": "inductor",
    "fused": "off", "place": {"vae": "cpu"}, "components": {"vae": "elsewhere"}, "allow_pt": True,
    "prompt_cache": Path("cache"),
}  # fmt: skip
WORDS: dict[str, tuple[str, ...]] = {
    "generate": ("a boat",), "edit": ("image.png", "a boat"), "plan": (), "report": (),
    "trace": ("a boat", "--out", "a.trace"), "serve": ("--no-page",), "doctor": ("--paint",),
    "eval-set": ("geneval", "--prompts", "prompts.jsonl", "--out", "out"),
    "check": ("pocket",), "convert": ("pocket", "out"), "show": ("image.png",), "models": (),
    "pull": ("owner/name",), "rehearse": (), "verify determinism": (), "verify parity": (),
    "verify invariance": (), "verify traces": ("a.trace", "b.trace"),
}  # fmt: skip
"""What each command needs beside options."""
ONLY_WEIGHTS = {"components", "allow_pt"}
TAKEN: dict[str, set[str]] = {
    **{name: set(VALUES) for name in ("generate", "edit", "eval-set", "serve")},
    # these compute prompt embeddings on purpose
    **{
        name: set(VALUES) - {"prompt_cache"}
        for name in ("plan", "trace", "report", *(f"verify {run.__name__}" for run in CHECKS[:3]))
    },
    "doctor": set(VALUES) - {"components", "allow_pt", "prompt_cache"},  # it has its own model
    "check": ONLY_WEIGHTS,
    "convert": ONLY_WEIGHTS,
    **{name: set() for name in ("show", "models", "pull", "rehearse", "verify traces")},
}
OWN = {("convert", "dtype"), ("rehearse", "memory")}
"""Flags of the same name that mean something else: what is written; a simulated card's memory."""


class ReachedError(DanqingError):
    """The weights or the engine would be opened now."""


@pytest.fixture
def reached(deepgen: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options with which weights and engine are opened; a command ends there."""
    import danqing.cli.opening
    from danqing.engine import Engine

    seen: dict[str, Any] = {}

    def open_checkpoint(path: str, components: Any = None, *, allow_pt: bool = False) -> Any:
        seen.update(components=components, allow_pt=allow_pt)
        return models.open_checkpoint(deepgen)

    def open_engine(_: Any, options: Options, **__: Any) -> Any:
        seen.update(options)
        raise ReachedError("reached")

    monkeypatch.setattr(danqing.cli.opening, "open_checkpoint", open_checkpoint)
    monkeypatch.setattr(Engine, "open", open_engine)
    return seen


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import danqing.serve.service

    class Opened:
        """A service that opens its engines at once."""

        def __init__(self, workers: Any, *_: Any, **__: Any) -> None:
            for worker in workers:
                for opener in worker._openers.values():
                    opener()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(danqing.serve.service, "Service", Opened)
    Image.new("RGB", (8, 8)).save("image.png")
    Path("prompts.jsonl").write_text('{"prompt": "a cat"}')


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def typed(name: str) -> list[str]:
    return arguments(Options(**{name: VALUES[name]}))


def test_every_command_and_option_is_tested() -> None:
    names = {command.__name__.replace("_", "-") for command in COMMANDS}
    names |= {f"verify {command.__name__}" for command in CHECKS}
    assert names == WORDS.keys() == TAKEN.keys()
    assert VALUES.keys() == Options.model_fields.keys()


def pairs() -> Iterator[tuple[str, str]]:
    for command in WORDS:
        for option in VALUES:
            if (command, option) not in OWN:
                yield command, option


@pytest.mark.parametrize(("command", "option"), [*pairs()])
def test_an_option_works_or_is_refused_by_name(
    command: str, option: str, reached: dict[str, Any]
) -> None:
    words = [*command.split(), *typed(option), *WORDS[command]]
    ran = invoke(*words)
    if option in TAKEN[command]:
        assert reached.get(option) == getattr(Options(**{option: VALUES[option]}), option), ran
        return
    assert ran.exit_code == 2
    flag = flags(option, Options)[0]
    assert f"No such option: {flag}" in ran.output or f"unknown option {flag}" in ran.output
    assert not reached


@pytest.mark.parametrize("option", sorted(TAKEN["doctor"]))
def test_doctor_refuses_what_it_would_ignore(option: str) -> None:
    ran = invoke("doctor", *typed(option))
    assert ran.exit_code == 2
    assert f"{flags(option, Options)[0]} has no effect without --paint" in ran.output


@pytest.mark.parametrize("command", [name for name, taken in TAKEN.items() if "quantize" in taken])
def test_the_old_spelling_works_and_is_hidden(command: str, reached: dict[str, Any]) -> None:
    assert "--quantise" not in invoke(*command.split(), "--help").output
    invoke(*command.split(), "--quantise", "int8", *WORDS[command])
    assert reached["quantize"] == "int8"
    both = invoke(*command.split(), "--quantise", "int8", "--quantize", "int8", *WORDS[command])
    assert both.exit_code == 2
    assert "the same option" in both.output


def test_arguments_repeat_the_options() -> None:
    options = Options(**VALUES)
    ran = invoke("generate", "a boat", *arguments(options), "--memory", "0")
    assert "invalid memory" in ran.output  # all others were read
    assert arguments(Options()) == []


# --- records -------------------------------------------------------------------------------------

RUN = ("--dtype", "float32", "--tile", "256", "--attention", "math", "--fused", "off",
       "--deterministic", "--placement", "staged", "--memory", "6GiB", "--place", "vae=cpu",
       "--device", "cpu", "--steps", "1")  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("painted") / "a.png"
    ran = invoke("generate", "a boat", *RUN, "-o", place, "-q")
    assert ran.exit_code == 0, ran.output
    return place


@pytest.fixture
def painted(original: Path) -> str:
    return shutil.copy(original, "a.png")


def test_the_record_keeps_the_options(painted: str) -> None:
    kept = pictures.read_record(painted)["options"]
    assert kept.keys() == Options.model_fields.keys() - LOCAL
    asked = {
        "device": "cpu", "dtype": "float32", "placement": "staged", "memory": 6 << 30, "tile": "256",
        "attention": "math", "deterministic": True, "compile": "off", "fused": "off",
        "place": {"vae": "cpu"}, "quantize": "off",
    }  # fmt: skip
    assert kept == asked


def planned(*words: object) -> tuple[dict[str, Any], str]:
    ran = invoke("generate", *words, "--dry-run", "--json")
    assert ran.exit_code == 0, ran.output
    return dict(json.loads(ran.stdout)["plan"]), ran.stderr


def test_from_restores_the_options_with_trust_alone(painted: str) -> None:
    plan, notes = planned("--from", painted, "--trust")
    assert (plan["dtype"], plan["placement"], plan["attention"]) == ("float32", "staged", "math")
    assert (plan["tile"], plan["limit_bytes"], plan["deterministic"]) == (256, 6 << 30, True)
    assert "memory=6442450944" in notes
    plan, notes = planned("--from", painted)
    assert (plan["placement"], plan["tile"], plan["deterministic"]) == ("resident", 0, False)
    for option in ("attention=math", "tile=256", "deterministic=yes"):
        assert option in notes.split("not taken from the record")[1]


def test_typed_flags_win(painted: str) -> None:
    typed = ("--placement", "resident", "--tile", "off", "--memory", "5GiB")
    plan, _ = planned("--from", painted, "--trust", *typed)
    assert (plan["placement"], plan["tile"], plan["limit_bytes"]) == ("resident", 0, 5 << 30)
    assert plan["attention"] == "math"


def test_the_restored_run_is_identical(painted: str) -> None:
    ran = invoke("generate", "--from", painted, "--trust", "--json", "-o", "b.png")
    assert json.loads(ran.stdout)["identical"]
    assert pictures.read_record("b.png")["options"] == pictures.read_record(painted)["options"]


NONSENSE: tuple[object, ...] = (
    True, -1, 0, 10**30, 1.5, "", "x", "\0", "~nobody/x", "\ud800", "a" * 100_000, [], [None],
    {"a": 1}, {"a": "b" * 10_000}, {str(number): "x" for number in range(1000)},
)  # fmt: skip


@pytest.mark.parametrize("option", [*sorted(Options.model_fields.keys() - LOCAL), "self", "other"])
def test_an_option_of_nonsense_is_no_bug(option: str, painted: str) -> None:
    with Image.open(painted) as image:
        for value in NONSENSE:
            record = pictures.read_record(painted)
            record["options"][option] = value
            pictures.save(image, record, "spoiled.png", overwrite=True)
            for more in ((), ("--trust",)):
                ran = invoke("generate", "--from", "spoiled.png", *more, "--dry-run", "-q")
                assert ran.exit_code in (0, 2, 4, 5, 7), (option, value, ran.output)
                assert len(ran.stderr) < 20_000
                assert "bug" not in ran.stderr


def test_a_record_does_not_open_files_by_options(painted: str) -> None:
    record = pictures.read_record(painted)
    record["options"].update(allow_pt=True, prompt_cache="there", components={"vae": "nowhere"})
    with Image.open(painted) as image:
        pictures.save(image, record, "spoiled.png")
    ran = invoke("generate", "--from", "spoiled.png", "--trust", "-q", "-o", "c.png")
    assert ran.exit_code == 0, ran.output
    assert not Path("there").exists()


def test_devices_that_are_not_here_are_left_out(painted: str) -> None:
    record = pictures.read_record(painted)
    record["options"].update(device="npu:7", attention="npu", place={"vae": "npu:6"})
    with Image.open(painted) as image:
        pictures.save(image, record, "far.png")
    plan, notes = planned("--from", "far.png", "--trust")
    assert (plan["dtype"], plan["tile"], plan["limit_bytes"]) == ("float32", 256, 6 << 30)
    assert "made on npu:6, npu:7, which is not here" in notes


@pytest.mark.parametrize("more", [(), ("--trust",)])
@pytest.mark.parametrize(
    "name", sorted(path.name for path in GALLERY.glob("*.png") if path.stem != "gallery")
)
def test_older_records_are_read(name: str, more: tuple[str, ...]) -> None:
    """Images of the last release, whose records have no options of their own."""
    record = pictures.read_record(str(GALLERY / name))
    assert "options" not in record
    plan, _ = planned("--from", GALLERY / name, *more, "--device", "cpu")
    assert not more or plan["dtype"] == record["provenance"]["dtype"]


def test_an_image_of_the_last_release_is_reproduced() -> None:
    name = GALLERY / "dusk.png"
    ran = invoke("generate", "--from", name, "--trust", "--json", "-o", "again.png")
    assert ran.exit_code == 0, ran.output
    assert "identical" in json.loads(ran.stdout)
