"""Plots as SVG, for one page that needs nothing else."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from danqing.escaping import escape
from danqing.report.words import word

if TYPE_CHECKING:
    from danqing.report.document import Difference, Parity

_LONGEST = 60
_LEAST = 1e-9
"""Errors of zero have no place on a logarithmic axis; they are drawn here."""
_PORT, _DRIFT, _FLOOR = "#a6321f", "#2f6f73", "#b9b2a3"


def errors(parity: Parity, language: str) -> str:
    """Draw the port's error and the drift of each joint over the band from floor to limit."""
    figure, axes = _figure(8.0, 3.2)
    places = range(len(parity.joints))
    floors = [joint.precision for joint in parity.joints]
    limits = [joint.limit for joint in parity.joints]
    axes.fill_between(
        places, floors, limits, color=_FLOOR, alpha=0.6, step="mid", lw=0,
        label=word("floor_band", language),
    )  # fmt: skip
    for name, colour, mark in (("port", _PORT, "o"), ("drift", _DRIFT, ".")):
        values = [max(getattr(joint, name) or _LEAST, _LEAST) for joint in parity.joints]
        label = word(name, language)
        axes.plot(places, values, color=colour, marker=mark, ms=3.5, lw=1, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("L2")
    every = max(1, len(parity.joints) // 16)
    ticks = list(places)[::every]
    axes.set_xticks(ticks, [_short(parity.joints[place].name) for place in ticks])
    axes.tick_params(axis="x", rotation=40, labelsize=7)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return _svg(figure, f"errors-{language}")


def differences(found: Difference, language: str) -> str:
    """Draw how many values differ by how many levels."""
    figure, axes = _figure(8.0, 2.2)
    axes.bar(range(len(found.histogram)), found.histogram, color=_PORT, width=0.9)
    axes.set_yscale("log")
    axes.set_xlabel(word("levels", language))
    axes.set_ylabel(word("values", language))
    axes.set_xlim(-0.7, max(8, len(found.histogram)) - 0.3)
    return _svg(figure, f"differences-{language}")


def _short(name: str) -> str:
    short = name.replace("denoise/", "").replace("encode/", "").replace("decode/", "")
    return escape(short[:_LONGEST], one_line=True).replace("$", r"\$")  # $ begins a formula


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _svg(figure: Any, salt: str) -> str:
    """Write a figure as one <svg> element, its text as text: the reader's fonts have Chinese."""
    import matplotlib as mpl

    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # only its width is guessed here
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
