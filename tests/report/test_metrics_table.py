"""`METRICS` is one table: a row added to it is in the verdict, the report, its schema and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema_rs  # comes with schemathesis
import numpy as np
import pytest
from typer.testing import CliRunner

from danqing.cli import app
from danqing.report.document import Difference, Report, read_report
from danqing.report.views import markdown, page
from danqing.verify.metrics import METRICS, Metric

if TYPE_CHECKING:
    from collections.abc import Iterator

KEPT = sorted((Path(__file__).parents[2] / "docs" / "reports").glob("*/report.json"))
"""Written before metrics were a table."""
SMALL = ("--height", "64", "--width", "64", "--steps", "1", "--seed", "3")


@pytest.fixture
def row() -> Iterator[Metric]:
    """The share of values that differ."""
    row = Metric(
        name="changed", measure=lambda first, second: float(np.mean(first != second)),
        better="lower", format=".3f", unit="%", words=("share changed", "变化比例"),
        meaning="share of values that differ",
    )  # fmt: skip
    METRICS.append(row)
    yield row
    METRICS.remove(row)


def test_a_row_is_in_the_report(row: Metric, tmp_path: Path) -> None:
    ran = CliRunner().invoke(
        app,
        ["report", "a boat", *SMALL, "--device", "cpu", "-q", "--repeats", "1", "--no-process", "--no-switches", "--no-cost",
         "--out", str(tmp_path)],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    data = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert data["cases"][0]["determinism"]["pictures"]["changed"] == 0
    schema = Report.model_json_schema()
    assert schema["$defs"]["Difference"]["properties"]["changed"]["description"] == row.meaning
    assert jsonschema_rs.is_valid(schema, data)
    assert "| share changed ↓ | 0.000 % |" in (tmp_path / "report.md").read_text("utf-8")
    assert "| 变化比例 ↓ | 0.000 % |" in (tmp_path / "report.zh.md").read_text("utf-8")
    assert "share changed" in (tmp_path / "report.html").read_text("utf-8")


def test_a_row_is_in_the_verdict(row: Metric) -> None:
    words = ["verify", "parity", "a boat", *SMALL, "--candidate", "cpu", "-q"]
    verdict = CliRunner().invoke(app, [*words, "--dtype", "bfloat16", "--json"])
    assert json.loads(verdict.stdout)["precision"]["changed"] > 0
    text = CliRunner().invoke(app, [*words, "--dtype", "bfloat16"]).stdout
    assert "PSNR " in text
    assert ", share changed 0." in text


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_older_reports_are_readable(row: Metric, path: Path) -> None:
    report = read_report(path)
    assert jsonschema_rs.is_valid(Report.model_json_schema(), json.loads(path.read_text("utf-8")))
    assert "changed" not in report.cases[0].determinism.pictures.values
    text = markdown(report, "en")
    assert "| SSIM ↑ | 1.000000 |" in text
    assert "share changed" not in text
    assert "share changed" not in page(report, path.parent)


FIRST = {"identical": True, "mse": 0.0, "largest": 0, "mean": 0.0, "psnr_db": None, "ssim": 1.0}


@pytest.mark.parametrize(
    "change",
    [{"other": 1.0}, {"ssim": None}, {"largest": 0.5}, {"mean": "much"}, {"identical": None}],
    ids=str,
)
def test_other_values_are_refused(change: dict[str, object]) -> None:
    sound = {**FIRST, "histogram": [3]}
    schema = Difference.model_json_schema()
    Difference.model_validate(sound)
    assert jsonschema_rs.is_valid(schema, sound)
    for values in (
        {**sound, **change},
        {name: value for name, value in sound.items() if name not in change and name != "mse"},
    ):
        with pytest.raises(ValueError, match=r"metric|must|valid"):
            Difference.model_validate(values)
        assert not jsonschema_rs.is_valid(schema, values)
