"""Markdown in two languages, and a page in one file: views of a report."""

from __future__ import annotations

import base64
import importlib.resources
import math
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from danqing.errors import OutputError
from danqing.escaping import escape
from danqing.files import read_regular
from danqing.quantities import size
from danqing.report import plots
from danqing.report.words import LANGUAGES, is_word, word
from danqing.verify.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from danqing.report.document import Difference, Report
    from danqing.verify.metrics import Metric

_IMAGE_BYTES = 1 << 28
_PNG = b"\x89PNG\r\n\x1a\n"


def markdown(report: Report, language: str) -> str:
    """Return the report as Markdown, its pictures beside it."""
    template = _templates(html=False).get_template("report.md.j2")
    words = partial(_one, language=language)
    return _render(template, report=report, t=words, language=language).rstrip() + "\n"


def page(report: Report, folder: Path) -> str:
    """Return the report as one HTML page that needs no other file and no network.

    Args:
        report: whose pictures lie in the folder.
        folder: where they are.

    Raises:
        OutputError: a picture is missing.
    """
    template = _templates(html=True).get_template("report.html.j2")
    return _render(
        template, report=report, t=_both, picture=partial(_embedded, folder), plots=plots
    )


def _render(template: Any, **values: Any) -> str:
    """Render a report; one that was changed by hand may contradict itself.

    Raises:
        OutputError: it cannot be shown.
    """
    from jinja2 import TemplateError

    try:
        text: str = template.render(**values, **_FUNCTIONS)
    except (TemplateError, LookupError, ArithmeticError, ValueError, TypeError) as error:
        raise OutputError(
            "the report cannot be shown: it contradicts itself",
            seen=f"{type(error).__name__}: {str(error)[:200]}",
        ) from error
    return escape(text)


def measured(differences: Sequence[Difference]) -> list[Metric]:
    """Return the metrics that are measured in any of these."""
    return [row for row in METRICS if any(_is_measured(row, found.values) for found in differences)]


def _is_measured(row: Metric, values: Mapping[str, float | None]) -> bool:
    """Say whether a metric has a value: null is an infinite one, of a metric that may be."""
    return row.name in values and (values[row.name] is not None or row.infinite)


def measure(found: Difference, row: Metric, language: str) -> str:
    """Return the value of a metric as text."""
    if not _is_measured(row, found.values):
        return "-"
    value = found.values[row.name]
    return word("infinite", language) if value is None else row.text(value)


def number(value: float | None, digits: str = ".2e") -> str:
    """Return a number, or a word for one that is not finite."""
    return "∞" if value is None or not math.isfinite(value) else format(value, digits)


def tera(value: float | None) -> str:
    """Return operations, or operations a second, in 1e12; small ones in 1e9."""
    if value is None:
        return "-"
    return f"{value / 1e12:.2f} T" if value >= 1e11 else f"{value / 1e9:.2f} G"  # noqa: PLR2004


def amount(value: int | None) -> str:
    """Return bytes for people."""
    return "-" if value is None else size(value)


_FUNCTIONS = {
    "measured": measured,
    "measure": measure,
    "number": number,
    "tera": tera,
    "amount": amount,
    "LANGUAGES": LANGUAGES,
}


class _Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def _cell(value: Any) -> str:
    """Return a value as text in Markdown, where it is no markup and ends no cell of a table."""
    if isinstance(value, _Markdown):
        return value
    text = re.sub(r"([\\|`\[\]])", r"\\\1", " ".join(str(value).splitlines()))
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _code(value: Any) -> _Markdown:
    """Return a value as code inside a line."""
    text = " ".join(str(value).splitlines()).replace("|", "\\|")
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return _Markdown(f"{fence}{pad}{text}{pad}{fence}")


def _fenced(value: Any) -> _Markdown:
    """Return a value as a block of text."""
    text = str(value)
    fence = "`" * max(3, _longest_run(text) + 1)
    return _Markdown(f"{fence}text\n{text}\n{fence}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _link(value: Any) -> _Markdown:
    """Return the name of a file as the target of a link."""
    return _Markdown(quote(str(value)))


def _one(key: str, language: str, **values: Any) -> _Markdown:
    if not is_word(str(key)):
        return _Markdown(_cell(key))
    values = {
        name: _cell(value) if isinstance(value, str) else value for name, value in values.items()
    }
    return _Markdown(word(str(key), language, **values))


def _both(key: str, **values: Any) -> Any:
    """Return a text in both languages, of which the page shows one."""
    from markupsafe import Markup
    from markupsafe import escape as escape_html

    texts = [word(str(key), language, **values) for language in LANGUAGES]
    if texts[0] == texts[1]:
        return _bold(escape_html(texts[0]))
    spans = (
        Markup('<span lang="{}">{}</span>').format(language, _bold(escape_html(text)))
        for language, text in zip(LANGUAGES, texts, strict=True)
    )
    return Markup("").join(spans)


def _bold(text: Any) -> Any:
    """Turn the little Markdown that words have into HTML."""
    from markupsafe import Markup

    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(text))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", bold))  # noqa: S704 - escaped before


def _embedded(folder: Path, name: str) -> str:
    """Return an image of the report's own folder: a report from elsewhere may name any file."""
    if Path(name).name != name or not name.lower().endswith(".png"):
        raise OutputError(
            "the report names an image outside its folder", seen=name, allowed="NAME.png"
        )
    try:
        data = read_regular(folder / name, _IMAGE_BYTES)
    except (OSError, ValueError) as error:
        raise OutputError(
            "an image of the report cannot be read",
            seen=f"{folder / name}: {getattr(error, 'strerror', None) or error}",
            hint="report.json and its images belong in one folder",
        ) from error
    if not data.startswith(_PNG):
        raise OutputError("an image of the report is not a PNG file", seen=folder / name)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _templates(*, html: bool) -> Any:
    """Return the templates; what they show is escaped, as HTML or as Markdown."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    home = importlib.resources.files("danqing.report") / "templates"
    found = {place.name: place.read_text("utf-8") for place in home.iterdir()}
    # Markdown is escaped by finalize, HTML by autoescape
    environment = Environment(  # nosec B701
        loader=DictLoader(found),
        autoescape=html,
        finalize=None if html else _cell,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "fenced": _fenced, "link": _link}
    return environment
