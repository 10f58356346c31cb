"""What a run says is text in a report, whatever it holds: never Markdown, HTML or a control."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from danqing.cli import app

KEPT = Path(__file__).parents[2] / "docs" / "reports" / "cpu-bfloat16"
HOSTILE = "<img src=x onerror=alert(1)>|[a](b)`c`\n```\n# d\x1b[2J\u202e$x_{$"
TEXTS = (
    ("model", "title"), ("model", "layout"), ("model", "path"), ("model", "attention_reason"),
    ("environment", "chip"), ("environment", "processor"), ("command",), ("made_at",),
    ("cases", 0, "command"), ("cases", 0, "request", "prompt"), ("cases", 0, "notes", 0),
    ("cases", 0, "determinism", "repeats", 0, "way"), ("cases", 0, "switches", 0, "note"),
    ("cases", 0, "switches", 0, "name"), ("cases", 0, "parity", "search", 0),
    ("cases", 0, "parity", "culprit"), ("cases", 0, "parity", "reference", "device", "chip"),
    ("cases", 0, "parity", "joints", 1, "name"), ("model", "components", 0, "why"),
)  # fmt: skip


def hostile() -> dict[str, Any]:
    """Return a report with hostile text in every such field."""
    report: dict[str, Any] = json.loads((KEPT / "report.json").read_text("utf-8"))
    report["cases"][0]["notes"] = ["a note"]
    parity = report["cases"][0]["parity"]
    parity |= {"search": ["a line"], "worst": HOSTILE}
    for field in TEXTS:
        place: Any = report
        for key in field[:-1]:
            place = place[key]
        place[field[-1]] = HOSTILE
    return report


@pytest.mark.finding(9)
def test_hostile_text_stays_text(tmp_path: Path) -> None:
    for image in KEPT.glob("*.png"):
        shutil.copy(image, tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(hostile()), "utf-8")
    result = CliRunner().invoke(app, ["report", "--views", str(tmp_path / "report.json")])
    assert "this is a bug" not in result.stderr, result.stderr
    assert result.exit_code in (0, 1), result.stderr
    for name in ("report.md", "report.zh.md", "report.html"):
        text = (tmp_path / name).read_text("utf-8")
        controls = [x for x in text if x not in "\n\t" and unicodedata.category(x) in ("Cc", "Cf")]
        assert not controls, name
        if name.endswith(".html"):
            assert "<img src=x" not in text
            continue
        outside = without_code(text)
        assert "<img" not in outside
        assert not re.search(r"(?<!\\)\[a\]\(b\)", outside)
        assert "\n# d" not in outside
        assert len({row.count("|") - row.count("\\|") for row in table(text)}) == 1


def without_code(text: str) -> str:
    """Return Markdown without its blocks and spans of code."""
    text = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def table(text: str) -> list[str]:
    """Return the rows of the table of the environment."""
    heading = "## Environment" if "## Environment" in text else "## 运行环境"
    rows = text.split(heading, 1)[1].split("\n## ", 1)[0].splitlines()
    return [row for row in rows if row.startswith("|")]
