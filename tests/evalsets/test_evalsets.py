"""Benchmarks' folders: names, settings, going on, and rows that cannot be used.

The rows are written here as the benchmarks' own copies have them.
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

import danqing
from danqing.errors import DanqingError, NoEffectError, OutputError, RequestError
from danqing.evalsets import PROTOCOLS, Protocol, Task, paint_set
from danqing.evalsets.painting import STATE
from danqing.evalsets.rows import read_rows
from danqing.pictures import read_record
from tests.conftest import call_danqing
from tests.fakes import FakeRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from danqing.runner import Runner

QUICK: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def engine(deepgen: Path) -> Iterator[danqing.Engine]:
    with danqing.open(deepgen, device="cpu") as engine:
        yield engine


def fill(runner: Runner, protocol: Protocol, *, on_row: Any = lambda *_: None, **task: Any) -> int:
    return paint_set(runner, Task(protocol=protocol, **task), on_row=on_row)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((48, 80)).convert("RGB").save(path)


def write_geneval(folder: Path) -> Path:
    rows = [
        {"tag": "counting", "include": [{"class": "cat", "count": n}], "prompt": f"{n} cats"}
        for n in (1, 2)
    ]
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "evaluation_metadata.jsonl"


def write_dpg(folder: Path) -> Path:
    (folder / "prompts").mkdir()
    for name in ("COCOval2014000000000139", "drawtext1"):
        (folder / "prompts" / f"{name}.txt").write_text(f"A picture of {name}.\nA second line.\n")
    return folder / "prompts"


def write_unigenbench(folder: Path) -> Path:
    text = io.StringIO()
    table = csv.DictWriter(text, ["index", "prompt_en", "sub_dims"])
    table.writeheader()
    table.writerows(
        [
            {"index": 7, "prompt_en": 'a "red" cat, asleep', "sub_dims": "{}"},
            {"index": 9, "prompt_en": "a dog"},
        ]
    )
    (folder / "test_prompts_en.csv").write_text(text.getvalue(), "utf-8-sig")
    return folder / "test_prompts_en.csv"


def write_wise(folder: Path) -> Path:
    for start, name in ((1, "cultural_common_sense"), (401, "spatio-temporal_reasoning")):
        rows = [
            {"prompt_id": start + n, "Prompt": f"thing {n}", "Explanation": "x"} for n in range(2)
        ]
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.json").write_text(json.dumps(rows))
    return folder / "data"


def write_corebench(folder: Path) -> Path:
    rows = {"C-MI-001": {"Prompt": "a street", "Checklist": [{"question": "Is it a street?"}]}}
    (folder / "C-MI.json").write_text(json.dumps(rows))
    return folder / "C-MI.json"


def write_cvtg(folder: Path) -> Path:
    for kind in ("CVTG", "CVTG-Style"):
        (folder / "CVTG-2K" / kind).mkdir(parents=True)
        for areas in (2, 3):
            rows = {"data_list": [{"index": 0, "prompt": f"{areas} signs", "carrier_list": []}]}
            (folder / "CVTG-2K" / kind / f"{areas}.json").write_text(json.dumps(rows))
            table = {str(row["index"]): row for row in rows["data_list"]}  # as the dataset has it
            combined = folder / "CVTG-2K" / kind / f"{areas}_combined.json"
            combined.write_text(json.dumps(table))
    return folder / "CVTG-2K"


def write_imgedit(folder: Path) -> Path:
    picture(folder / "singleturn" / "animal" / "000342021.jpg")
    rows = {
        n: {"id": "animal/000342021.jpg", "prompt": f"turn it {n}", "edit_type": "style"}
        for n in ("1082", "673")
    }
    (folder / "singleturn" / "singleturn.json").write_text(json.dumps(rows))
    return folder / "singleturn" / "singleturn.json"


def write_gedit(folder: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((48, 80)).convert("RGB").save(buffer, "PNG")
    rows = [
        {"key": f"k{n}", "task_type": "color_alter", "instruction": f"make it {n}", "instruction_language": language,
         "input_image": {"bytes": buffer.getvalue(), "path": "a.png"}}
        for n, language in enumerate(("en", "cn"))
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    return folder / "train-00000-of-00001.parquet"


def write_rise(folder: Path) -> Path:
    picture(folder / "data" / "temporal_reasoning_images" / "1.png")
    row = {"index": "temporal_reasoning_1", "category": "temporal_reasoning", "instruction": "ten years on",
           "image": "temporal_reasoning_images/1.png"}  # fmt: skip
    (folder / "data" / "datav2_total_w_subtask.json").write_text(json.dumps([row]))
    return folder / "data" / "datav2_total_w_subtask.json"


def write_unireditbench(folder: Path) -> Path:
    picture(folder / "original_image" / "maze" / "3.png")
    row = {"idx": "3", "name": "maze", "instruction": "solve it", "rules": "Stay on the path.",
           "original_image_path": "original_image/maze/3.png"}  # fmt: skip
    (folder / "data.json").write_text(json.dumps([row]))
    return folder / "data.json"


LAYOUTS: dict[str, tuple[Callable[[Path], Path], set[str]]] = {
    "geneval": (
        write_geneval,
        {f"0000{n}/samples/000{i}.png" for n in range(2) for i in range(4)}
        | {f"0000{n}/metadata.jsonl" for n in range(2)},
    ),
    "dpg-bench": (write_dpg, {"COCOval2014000000000139.png", "drawtext1.png"}),
    "unigenbench": (write_unigenbench, {f"{n}_{i}.png" for n in (7, 9) for i in range(4)}),
    "wise": (write_wise, {f"{n}.png" for n in (1, 2, 401, 402)}),
    "t2i-corebench": (write_corebench, {f"C-MI/C-MI-001-{i}.png" for i in range(4)}),
    "cvtg-2k": (write_cvtg, {f"{k}/{a}/0.png" for k in ("CVTG", "CVTG-Style") for a in (2, 3)}),
    "imgedit": (write_imgedit, {"1082.png", "673.png"}),
    "gedit": (
        write_gedit,
        {f"fullset/color_alter/{lang}/{key}{end}.png" for key, lang in (("k0", "en"), ("k1", "cn")) for end in ("", "_SRCIMG")},
    ),
    "rise": (write_rise, {"images/temporal_reasoning/temporal_reasoning_1.png"}),
    "unireditbench": (write_unireditbench, {"maze/3.png"}),
}  # fmt: skip


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_protocol_is_tested() -> None:
    assert LAYOUTS.keys() == PROTOCOLS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_folder_its_scorer_reads(name: str, engine: danqing.Engine, tmp_path: Path) -> None:
    write, expected = LAYOUTS[name]
    prompts, out, protocol = write(tmp_path), tmp_path / "out", PROTOCOLS[name]
    painted = fill(engine, protocol, prompts=prompts, out=out, settings=QUICK)
    assert files_in(out) == expected
    pictures = [path for path in out.rglob("*.png") if not path.stem.endswith("_SRCIMG")]
    assert painted == len(pictures) * (4 if protocol.grid else 1)
    sizes = {Image.open(path).size for path in pictures}
    assert sizes == {(128, 128) if protocol.grid else (64, 64)}
    records = [read_record(path) for path in pictures]
    seeds = [seed for one in records for seed in one.get("grid", [one["request"]["seed"]])]
    assert sorted(seeds) == list(range(42, 42 + painted))
    for record in records:
        request = record["request"]
        assert request["guidance_scale"] == (7.5 if name == "dpg-bench" else 4.0)
        assert (request["resize"] == "stretch") == protocol.edits
        assert bool(request["negative_prompt"]) == protocol.edits
    again = fill(engine, protocol, prompts=prompts, out=out, settings=QUICK)
    assert again == 0


def test_any_runner_fills_the_folder(tmp_path: Path) -> None:
    job: dict[str, Any] = {"prompts": write_geneval(tmp_path), "out": tmp_path / "out"}
    settings = {"height": 64, "width": 32}
    assert fill(FakeRunner(), PROTOCOLS["geneval"], settings=settings, **job) == 8
    assert files_in(tmp_path / "out") == LAYOUTS["geneval"][1]
    other = FakeRunner(fingerprint="1" * 64)
    with pytest.raises(OutputError, match="made otherwise"):
        fill(other, PROTOCOLS["geneval"], settings=settings, **job)


def test_prompts_are_those_of_the_rows(engine: danqing.Engine, tmp_path: Path) -> None:
    cases = {
        "dpg-bench": ("drawtext1.png", "A picture of drawtext1."),
        "unigenbench": ("7_0.png", 'a "red" cat, asleep'),
        "unireditbench": ("maze/3.png", "Stay on the path. solve it"),
    }
    for name, (file, prompt) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        out = folder / "out"
        fill(engine, PROTOCOLS[name], prompts=LAYOUTS[name][0](folder), out=out, settings=QUICK)
        assert read_record(out / file)["request"]["prompt"] == prompt


def test_what_was_interrupted_goes_on_to_the_same(engine: danqing.Engine, tmp_path: Path) -> None:
    prompts, protocol = write_geneval(tmp_path), PROTOCOLS["geneval"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fill(engine, protocol, prompts=prompts, out=whole, settings=QUICK)
    fill(engine, protocol, prompts=prompts, out=parts, limit=1, settings=QUICK)
    (parts / "00000" / "samples" / "0002.png").unlink()

    class Stop(Exception):  # noqa: N818
        pass

    def stop(*_: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        fill(engine, protocol, prompts=prompts, out=parts, settings=QUICK, on_row=stop)
    assert "00001/samples/0000.png" not in files_in(parts)
    fill(engine, protocol, prompts=prompts, out=parts, settings=QUICK, batch=2)
    assert files_in(parts) == files_in(whole)
    for path in whole.rglob("*.png"):
        other = parts / path.relative_to(whole)
        assert Image.open(path).size == Image.open(other).size
        assert read_record(path)["request"]["seed"] == read_record(other)["request"]["seed"]


def test_rows_that_share_a_file_name(engine: danqing.Engine, tmp_path: Path) -> None:
    """Equal ones are painted once; of different ones the second would be dropped in silence."""
    rows = [{"prompt_id": 1, "Prompt": "a cat"}, {"prompt_id": 1, "Prompt": "a cat"}]
    (tmp_path / "wise.json").write_text(json.dumps(rows))
    job: dict[str, Any] = {"prompts": tmp_path / "wise.json", "settings": QUICK}
    assert fill(engine, PROTOCOLS["wise"], out=tmp_path / "out", **job) == 1
    rows[1]["Prompt"] = "a dog"
    (tmp_path / "wise.json").write_text(json.dumps(rows))
    with pytest.raises(RequestError, match="two rows share a file name") as caught:
        fill(engine, PROTOCOLS["wise"], out=tmp_path / "other", **job)
    assert caught.value.seen == "rows 0 and 1: 1.png"
    named = {"name": "{number}-{key}.png", **job}
    assert fill(engine, PROTOCOLS["wise"], out=tmp_path / "named", **named) == 2


def test_corebench_finds_its_images(engine: danqing.Engine, tmp_path: Path) -> None:
    """The scorer takes the first three parts of a file's name for a key of its table."""
    prompts = write_corebench(tmp_path)
    job: dict[str, Any] = {"prompts": prompts, "out": tmp_path / "out", "settings": QUICK}
    fill(engine, PROTOCOLS["t2i-corebench"], **job)
    table = json.loads(prompts.read_text())
    names = [path.name for path in (tmp_path / "out" / "C-MI").glob("*.png")]
    assert {"-".join(name.split("-")[:3]) for name in names} == set(table)


def test_pictures_made_otherwise_are_not_mixed(engine: danqing.Engine, tmp_path: Path) -> None:
    prompts, out = write_wise(tmp_path), tmp_path / "out"
    fill(engine, PROTOCOLS["wise"], prompts=prompts, out=out, limit=1, settings=QUICK)
    with pytest.raises(OutputError, match="made otherwise") as caught:
        fill(engine, PROTOCOLS["wise"], prompts=prompts, out=out, settings={**QUICK, "seed": 1})
    assert "settings" in str(caught.value)


def test_dpg_bench_reads_every_file_of_its_folder(engine: danqing.Engine, tmp_path: Path) -> None:
    """As its scorer does: each entry of the folder is opened, and its stem names a prompt."""
    out = tmp_path / "out"
    fill(engine, PROTOCOLS["dpg-bench"], prompts=write_dpg(tmp_path), out=out, settings=QUICK)
    for name in (names := os.listdir(out)):  # noqa: PTH208 - the very call of the scorer
        with Image.open(out / name) as grid:
            assert grid.size == (128, 128)
        assert name.split(".")[0] in {"COCOval2014000000000139", "drawtext1"}
    assert len(names) == 2


@pytest.mark.parametrize("place", ["out", "out/", ".", "deep/out"])
def test_an_earlier_state_is_moved_and_honoured(
    place: str, engine: danqing.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions kept the state inside the folder."""
    prompts = write_wise(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    out = Path(place)
    job: dict[str, Any] = {"prompts": prompts, "out": out, "settings": QUICK}
    fill(engine, PROTOCOLS["wise"], limit=1, **job)
    (state,) = tmp_path.rglob(f"*.{STATE}")
    assert state == Path(f"{out.absolute().resolve()}.{STATE}")
    kept = state.read_text()
    state.rename(out / STATE)
    with pytest.raises(OutputError, match="made otherwise"):
        fill(engine, PROTOCOLS["wise"], **{**job, "settings": {**QUICK, "seed": 1}})
    assert not (out / STATE).exists()
    state.rename(out / STATE)
    assert fill(engine, PROTOCOLS["wise"], **job) == len(read_rows(prompts)) - 1
    assert not (out / STATE).exists()
    assert state.read_text() == kept


def test_a_model_without_guidance_paints_too(schnell: Path, tmp_path: Path) -> None:
    with danqing.open(schnell, device="cpu") as flux:
        fill(flux, PROTOCOLS["dpg-bench"], prompts=write_dpg(tmp_path), out=tmp_path / "out",
                  settings=QUICK, limit=1)  # fmt: skip
        with pytest.raises(NoEffectError, match="edits images"):
            fill(flux, PROTOCOLS["rise"], prompts=tmp_path, out=tmp_path / "o", settings={})
    assert len(files_in(tmp_path / "out")) == 1


BAD: dict[str, tuple[str, Any, str]] = {
    "nothing there": ("geneval", None, "cannot be read"),
    "empty": ("geneval", "", "no prompts"),
    "no JSON": ("geneval", "{", "no JSON"),
    "a number": ("geneval", "3", "no table"),
    "no prompt": ("geneval", '{"tag": "x"}', "row 0 has no prompt"),
    "a prompt of no text": ("geneval", '{"prompt": 3}', "row 0 has no prompt"),
    "no picture": ("rise", '{"instruction": "x", "category": "c"}', "names no picture"),
    "a picture that is not there": (
        "rise", '{"instruction": "x", "category": "c", "image": "a.png"}', "reference image not found",
    ),
    "no category": ("rise", '{"instruction": "x", "image": "a.png"}', "cannot be given a file name"),
    "out of the folder": ("wise", '{"Prompt": "x", "prompt_id": "../../x"}', "outside the folder"),
    "an absolute name": ("wise", '{"Prompt": "x", "prompt_id": "/tmp/x"}', "outside the folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rows_that_cannot_be_used(case: str, engine: danqing.Engine, tmp_path: Path) -> None:
    name, text, words = BAD[case]
    prompts = tmp_path / "prompts.jsonl"
    if text is not None:
        prompts.write_text(text)
    with pytest.raises(DanqingError, match=words):
        fill(engine, PROTOCOLS[name], prompts=prompts, out=tmp_path / "out", settings=QUICK)
    assert not list(tmp_path.rglob("*.png"))


def test_other_forms_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["one", "two"]')
    (tmp_path / "b.json").write_text('{"k": {"prompt": "three"}}')
    assert [row["prompt"] for row in read_rows(tmp_path)] == ["one", "two", "three"]
    assert read_rows(tmp_path / "b.json")[0]["key"] == "k"
    (tmp_path / "c.docx").write_text("x")
    with pytest.raises(RequestError, match="no known form"):
        read_rows(tmp_path / "c.docx")


def test_from_the_command_line(deepgen: Path, tmp_path: Path) -> None:
    prompts = write_corebench(tmp_path)
    command = ("eval-set", "T2I-CoREBench", "--prompts", prompts, "-m", deepgen, "--device", "cpu")
    done = call_danqing(
        *command, "--out", tmp_path / "o", "--height", 64, "--width", 64, "--steps", 1
    )
    assert done.returncode == 0, done.stderr
    assert "4 images generated" in done.stderr
    done = call_danqing("eval-set", "--list")
    assert all(name in done.stdout for name in PROTOCOLS)
    done = call_danqing("eval-set", "imagenet", "--prompts", prompts, "--out", tmp_path / "x")
    assert done.returncode == 2
    assert "geneval" in done.stderr
    done = call_danqing("eval-set", "geneval")
    assert done.returncode == 2
