"""The report: what is in it, its views, what a browser makes of it, and what changed since."""

from __future__ import annotations

import json
import os
import re
import shutil
import string
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from danqing.cli import app
from danqing.pictures import read_record
from danqing.report.document import Report, read_report
from danqing.report.words import WORDS

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "a red boat"
SMALL = ["--height", "64", "--width", "64", "--steps", "2", "--seed", "3"]
QUICK = ["--repeats", "1", "--no-process", "-q"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What bfloat16 costs the pocket model: the reference is a trace in float32."""
    home = tmp_path_factory.mktemp("report")
    trace = home / "float32.trace"
    assert invoke("trace", PROMPT, *SMALL, "--dtype", "float32", "--out", trace).exit_code == 0
    ran = invoke(
        "report", "--out", home / "out", "--reference", trace, "--dtype", "bfloat16", *QUICK
    )
    assert ran.exit_code == 0, ran.output
    return home / "out"


@pytest.fixture(scope="module")
def edited(deepgen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tasks of a toy DeepGen, against the CPU itself."""
    home = tmp_path_factory.mktemp("edited")
    ran = invoke(
        "report", "a cat", "-m", deepgen, "--edit", "make it blue", "--out", home, *SMALL, *QUICK,
        "--no-switches", "--no-cost",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    return home


def test_what_the_json_says(written: Path) -> None:
    report = read_report(written / "report.json")
    assert report.passed
    (case,) = report.cases
    assert case.request["seed"] == 3
    assert case.request["prompt"] == PROMPT
    assert case.determinism.passed
    assert case.determinism.pictures.identical
    assert case.determinism.pictures.values["psnr_db"] is None
    parity = case.parity
    assert parity is not None
    assert parity.from_trace
    assert parity.rung == "close"
    assert parity.reference["dtype"] == "float32"
    # the candidate is the CPU in bfloat16: all of its error is the precision's
    for joint in parity.joints:
        assert joint.port == pytest.approx(joint.precision, rel=0.5), joint.name
    assert parity.picture.values["psnr_db"] == pytest.approx(parity.precision.values["psnr_db"])
    assert sum(parity.picture.histogram) == 64 * 64 * 3
    assert {one.rung for one in case.switches} <= {"identical", "close", "alike", None}
    assert case.timing.steps == 2
    assert case.timing.step_flops
    assert {part.name for part in report.model.components} == {
        "text_encoder", "text_encoder_2", "transformer", "vae",
    }  # fmt: skip
    assert all(part.load_seconds is not None for part in report.model.components)
    assert report.environment.libraries["torch"]
    assert not report.environment.simulated


def test_its_pictures(written: Path) -> None:
    """Measured here by hand: the difference picture is what it says it is."""
    report = read_report(written / "report.json")
    parity = report.cases[0].parity
    assert parity is not None
    ours, theirs, away = (
        np.asarray(Image.open(written / file.file), np.int64)
        for file in (report.cases[0].picture, parity.reference_file, parity.difference_file)
    )
    assert np.array_equal(np.minimum(np.abs(ours - theirs) * parity.difference_factor, 255), away)
    assert parity.picture.values["mse"] == pytest.approx(((ours - theirs) ** 2).mean())
    assert read_record(written / report.cases[0].picture.file)["request"]["prompt"] == PROMPT


def test_the_command_makes_the_picture_again(written: Path, tmp_path: Path) -> None:
    import shlex

    case = read_report(written / "report.json").cases[0]
    words = shlex.split(case.command)
    assert words[0] == "danqing"
    ran = invoke(*words[1:], "-q", "-o", tmp_path / "again.png")
    assert ran.exit_code == 0, ran.output
    again = Image.open(tmp_path / "again.png").tobytes()
    assert again == Image.open(written / case.picture.file).tobytes()


ROWS = {
    "report.md": (
        "torch", "diffusers", "transformers", "accelerate", "Environment", "memory of weights",
        "Parameters", "--num-inference-steps", "--seed", "MSE", "largest pixel difference",
        "mean pixel difference", "pixels identical", "PSNR", "SSIM", "infinite", "it/s",
        "seconds a step", "load", "peak memory", "share of the peak", "size of the file",
        "Known warnings", "in all", "attention", "no remote code", "noise floor", "Whose fault",
    ),
    "report.zh.md": (
        "适配报告", "运行环境", "权重内存", "参数", "最大像素差", "平均像素差", "无穷大", "每步秒数",
        "峰值利用率", "已知的无害警告", "噪声底", "归因",
    ),
}  # fmt: skip
"""What the adaptation note of DeepGen-1.0 on Ascend has, and what it could not fill."""


@pytest.mark.parametrize("name", list(ROWS))
def test_every_table_is_in_the_markdown(written: Path, name: str) -> None:
    text = (written / name).read_text("utf-8")
    assert [row for row in ROWS[name] if row not in text] == []
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) >= 12
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    for file in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (written / file).is_file()


def test_editing_has_a_case_of_its_own(edited: Path) -> None:
    report = read_report(edited / "report.json")
    assert [case.name for case in report.cases] == ["text to image", "edit"]
    edit = report.cases[1]
    (image,) = edit.request["image"]
    assert image["path"].endswith("/text-to-image.png")
    assert edit.command.startswith("danqing edit ")
    assert edit.parity is not None
    assert edit.parity.rung == "identical"
    names = {part.name for part in report.model.components}
    assert names == {"vlm", "connector", "transformer", "vae"}


def test_a_verdict_that_fails_is_written_and_ends_with_1(tmp_path: Path) -> None:
    trace = tmp_path / "a.trace"
    invoke("trace", PROMPT, *SMALL, "--dtype", "float32", "--out", trace)
    ran = invoke(
        "report", "--out", tmp_path / "out", "--reference", trace, "--dtype", "bfloat16", *QUICK,
        "--no-switches", "--no-cost", "--require", "identical",
    )  # fmt: skip
    assert ran.exit_code == 1
    report = read_report(tmp_path / "out" / "report.json")
    assert not report.passed
    assert "FAILED" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_views_are_written_again_from_the_json(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "copy")
    before = (tmp_path / "copy" / "report.html").read_text("utf-8")
    for view in ("report.html", "report.md", "report.zh.md"):
        (tmp_path / "copy" / view).unlink()
    ran = invoke("report", "--views", tmp_path / "copy" / "report.json")
    assert ran.exit_code == 0
    assert (tmp_path / "copy" / "report.html").read_text("utf-8") == before


def test_what_changed(written: Path, tmp_path: Path) -> None:
    data = json.loads((written / "report.json").read_text("utf-8"))
    data["environment"]["libraries"]["torch"] = "9.9.9"
    data["environment"]["software"]["cann"] = "8.5.1"
    data["cases"][0]["timing"]["seconds_per_step"] *= 2
    data["cases"][0]["determinism"]["passed"] = False
    data["cases"][0]["picture"]["pixels_sha256"] = "0" * 64
    (tmp_path / "b.json").write_text(json.dumps(data), "utf-8")
    ran = invoke("report", "--compare", written / "report.json", tmp_path / "b.json")
    assert ran.exit_code == 1
    assert "library: torch" in ran.output
    assert "software: cann: - -> 8.5.1" in ran.output
    assert "2.00 times" in ran.output
    assert "deterministic: True -> False  WORSE" in ran.output
    same = invoke("report", "--compare", written / "report.json", written / "report.json")
    assert same.exit_code == 0
    assert "nothing changed" in same.output


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"report_schema": 2}', "not json"])
def test_a_damaged_report_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    ran = invoke("report", "--views", tmp_path / "report.json")
    assert ran.exit_code == 7
    assert "invalid or damaged report" in ran.output
    assert invoke("report", "--views", tmp_path / "missing.json").exit_code == 7


def test_both_languages_say_the_same() -> None:
    for key, (english, chinese) in WORDS.items():
        fields = [
            {name for _, name, _, _ in string.Formatter().parse(text) if name}
            for text in (english, chinese)
        ]
        assert fields[0] == fields[1], key


def test_every_word_of_the_templates_is_known() -> None:
    import importlib.resources

    home = importlib.resources.files("danqing.report") / "templates"
    for place in home.iterdir():
        used = set(re.findall(r"\bt\('([^']+)'", place.read_text("utf-8")))
        assert used - set(WORDS) == set()


def test_a_prompt_cannot_write_into_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> | <img src=x>"
    ran = invoke(
        "report", evil, *SMALL, "--out", tmp_path, "--reference", "none", *QUICK, "--no-switches",
        "--no-cost", "--device", "cpu",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "<script" not in html
    assert "<img src=x" not in html


def test_the_page_in_a_browser(written: Path, tmp_path: Path) -> None:
    """Chromium finds nothing to complain about, asks nobody anything, and prints it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        assert "CI" not in os.environ, "CI has a browser: make tools installs it"
        pytest.skip("chromium is not installed: make tools")
    from playwright.sync_api import sync_playwright

    requests: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((written / "report.html").as_uri())
        assert page.locator("h1").inner_text().startswith("Adaptation report")
        assert page.locator("figure img").count() == 3
        loaded = page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert loaded
        assert page.locator(".plot svg:visible").count() == 2
        page.locator("label[for=zh]").click()
        assert page.locator("h1").inner_text().startswith("适配报告")
        assert not page.get_by_text("Adaptation report").is_visible()
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.screenshot(path=tmp_path / "report.png", full_page=True)
        page.pdf(path=tmp_path / "report.pdf")
        browser.close()
    assert complaints == []
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000


def test_the_schema_in_the_docs_is_the_codes() -> None:
    from pathlib import Path as Place

    place = Place(__file__).parents[2] / "docs" / "reference" / "report.schema.json"
    assert json.loads(place.read_text("utf-8")) == Report.model_json_schema()


def test_a_report_is_a_plain_folder(written: Path) -> None:
    assert not [path.name for path in written.iterdir() if path.name.startswith(".")]


def test_what_runs_nothing_takes_no_settings(written: Path) -> None:
    place = written / "report.json"
    for words in (
        ["a boat", "--views", place], ["--seed", "3", "--compare", place, place],
        ["--views", place, "--compare", place, place], ["--views", place, "--json"],
        ["a boat", "--json"],
    ):  # fmt: skip
        ran = invoke("report", *words)
        assert ran.exit_code == 2, ran.output
        assert "no effect" in ran.output or "stand alone" in ran.output


def test_a_foreign_report_embeds_no_other_files(written: Path, tmp_path: Path) -> None:
    """`--views` on a report from elsewhere must not put any file of this machine into the page."""
    for number, name in enumerate(("/etc/passwd", "../secret.png", "secret.png", "missing.png")):
        folder = tmp_path / str(number)
        shutil.copytree(written, folder)
        (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
        (folder / "secret.png").write_bytes(b"root:x:0:0")
        table = json.loads((folder / "report.json").read_text("utf-8"))
        table["cases"][0]["picture"]["file"] = name
        (folder / "report.json").write_text(json.dumps(table), "utf-8")
        before = (folder / "report.html").read_bytes()
        ran = invoke("report", "--views", folder / "report.json")
        assert ran.exit_code == 7, ran.output
        assert (folder / "report.html").read_bytes() == before
