"""Write the reference pages from the code, or with --check see that they are up to date.

python docs/generate.py [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
HEAD = "<!-- Written by docs/generate.py from the code; do not edit. -->\n\n"
COMMANDS = (
    "generate", "edit", "plan", "eval-set", "models", "check", "convert", "pull", "show", "trace",
    "verify determinism", "verify parity", "verify invariance", "verify traces", "report",
    "rehearse", "serve", "doctor",
)  # fmt: skip
SIGNALS = [
    (130, "Ctrl-C (SIGINT)"),
    (141, "the reader of standard output left (SIGPIPE)"),
    (143, "SIGTERM"),
]


def errors_page() -> Iterator[str]:
    from danqing.errors import DanqingError

    yield "# Errors and exit codes\n"
    yield (
        "Every error says what happened, the value seen, what is allowed, and what to do next. The "
        "command line prints it on standard error and exits with the code below; `--debug` adds "
        "the traceback. The Python library raises the class. Exit code 0 is success, 1 a bug in "
        "danqing (of `danqing verify`, a verdict that failed), 2 also a mistyped option, 7 also a "
        "standard output that is closed or full. Characters from files that a terminal would obey "
        "are printed as escapes, such as `\\x1b`.\n"
    )
    yield "| class | exit code | HTTP status | meaning |\n|---|---|---|---|"
    yield from _error_rows(DanqingError, 0)
    yield "\nInterrupted from outside:\n\n| exit code | reason |\n|---|---|"
    for code, reason in SIGNALS:
        yield f"| {code} | {reason}; pictures finished before stay, nothing half-written is left |"


def _error_rows(kind: Any, depth: int) -> Iterator[str]:
    name = f"{'&nbsp;&nbsp;' * depth}`{kind.__name__}`"
    meaning = (kind.__doc__ or "").split("\n")[0]
    yield f"| {name} | {kind.exit_code} | {kind.http_status} | {meaning} |"
    for child in kind.__subclasses__():
        yield from _error_rows(child, depth + 1)


def settings_page() -> Iterator[str]:
    from danqing.cli.options import flags
    from danqing.models import deepgen, identify, open_checkpoint, sd3
    from danqing.models.flux import spec
    from danqing.options import Options
    from danqing.request import Request
    from danqing.validation import allowed_values
    from danqing.weights import POCKET

    yield "# Settings of a request\n"
    yield (
        "The fields of `danqing.Request`, their flags on the command line (underscores and dashes "
        "are the same), and keys of a JSON line in a prompts file. A setting that a model would "
        "ignore is refused when it is given.\n"
    )
    specs = [
        spec(),
        spec(guided=True),
        deepgen.spec(),
        sd3.spec(),
        identify(open_checkpoint(POCKET)),
    ]
    titles = " | ".join(f"{one.title}" for one in specs)
    yield f"| setting | flags | allowed | {titles} | meaning |"
    yield "|---|---|---|" + "---|" * len(specs) + "---|"
    for name, field in Request.model_fields.items():
        shown = (
            "`PROMPT`, `--prompt`" if name == "prompt" else ", ".join(f"`{f}`" for f in flags(name))
        )
        cells = " | ".join(_default(one, name, field.default) for one in specs)
        allowed = allowed_values(Request, name) or "text"
        yield f"| `{name}` | {shown} | {allowed} | {cells} | {field.description} |"
    yield "\n# Options of a run\n"
    yield (
        "The fields of `danqing.Options`: arguments of `danqing.open`, and flags of every command "
        "that opens a model. An image's record keeps them, but for those about files.\n"
    )
    yield "| option | flag | default | meaning |\n|---|---|---|---|"
    for name, field in Options.model_fields.items():
        default = field.default if isinstance(field.default, str) else "-"
        meaning = (field.description or "").split("  [")[0]
        yield f"| `{name}` | `{flags(name, Options)[0]}` | {default} | {meaning} |"


def _default(spec: Any, name: str, general: Any) -> str:
    if name in spec.no_effect:
        return "refused"
    value = spec.defaults.get(name, general)
    if name == "prompt":
        return "required"
    if name == "negative_prompt" and value is not None:
        return "nothing; in edits faults of pictures" if "image" in spec.takes else "nothing"
    return "random" if name == "seed" and value is None else str(value)


def commands_page() -> Iterator[str]:
    from typer.testing import CliRunner

    from danqing.cli import app

    yield "# Commands\n"
    yield "Underscores and dashes in option names are the same: `--model_path` is `--model-path`.\n"
    for words in [[], *(command.split() for command in COMMANDS)]:
        title = " ".join(["danqing", *words])
        text = CliRunner().invoke(app, [*words, "--help"], prog_name="danqing").stdout
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        yield f"## {title}\n\n```text\n{lines}\n```\n"


def ascend_page() -> Iterator[str]:
    from danqing.devices.ascend_chips import CHIPS
    from danqing.devices.ascend_doctor import TROUBLES
    from danqing.devices.ascend_errors import CODES, TEXTS

    yield "# Ascend: chips, and what its errors mean\n"
    yield (
        "From CANN's and torch_npu's documentation and their users' reports; none was seen on "
        "hardware by danqing. The [guide](../guides/ascend.md) says how to begin.\n"
    )
    yield "## When torch_npu cannot be loaded\n"
    yield "`danqing doctor` finds these texts, as regular expressions, in what it prints:\n"
    yield "| text | what it means | what to do |\n|---|---|---|"
    for one in TROUBLES:
        text = one.text.replace("|", "\\|")
        yield f"| `{text}` | {one.reason} | {one.hint} |"
    yield "\n## When it fails in the middle\n"
    yield "| code or text | what it means | what to do |\n|---|---|---|"
    for code, meaning, advice in (*CODES, *TEXTS):
        yield f"| `{code.replace('|', chr(92) + '|')}` | {meaning} | {advice} |"
    yield "\n## Chips\n"
    yield "| chip | memory, GiB | float16, TFLOP/s | GB/s | bfloat16 |\n|---|---|---|---|---|"
    for chip in CHIPS:
        yes = "yes" if chip.bfloat16 else "no"
        yield f"| {chip.name} | {chip.memory_gib} | {chip.tflops} | {chip.bandwidth:g} | {yes} |"


def licences_page() -> Iterator[str]:
    yield "# Licences of dependencies\n"
    yield (
        "What `pip install danqing` and `danqing[serve]` install, on Python 3.11 with "
        "`constraints.txt`, as each package's own metadata states it. danqing itself is under "
        "Apache-2.0. On Linux, PyPI's torch also installs NVIDIA's CUDA libraries, which are under "
        "NVIDIA's own terms, and Triton (MIT); torch built for a CPU or for Ascend does not.\n"
    )
    yield "| package | licence | needed by |\n|---|---|---|"
    for name, (licence, needed_by) in sorted(_dependencies().items()):
        yield f"| {name} | {licence} | {', '.join(sorted(needed_by))} |"


_OF_CUDA = ("nvidia-", "cuda-", "triton")


def _dependencies() -> dict[str, tuple[str, set[str]]]:
    """Return the licence of each runtime dependency, and what asks for it."""
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, tuple[str, set[str]]] = {}
    waiting = [("danqing", "danqing", frozenset({"", "serve"}))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        asker, name, extras = waiting.pop()
        if name != "danqing":
            licence = _licence(metadata.metadata(name))
            found.setdefault(name, (licence, set()))[1].add(asker)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for row in metadata.requires(name) or ():
            need = Requirement(row)
            other = canonicalize_name(need.name)
            wanted = any(
                need.marker is None or need.marker.evaluate({"extra": extra}) for extra in extras
            )
            if wanted and other != "danqing" and not other.startswith(_OF_CUDA):
                waiting.append((name, other, frozenset({"", *need.extras})))
    return found


def _licence(about: Any) -> str:
    """Return what a package's metadata states: SPDX first, then classifiers, then free text."""
    if expression := about.get("License-Expression"):
        return str(expression)
    rows = [row for row in about.get_all("Classifier") or () if row.startswith("License ::")]
    names = {row.split(" :: ")[-1] for row in rows} - {"OSI Approved"}
    first = (str(about.get("License") or "").strip().splitlines() or ["not stated"])[0]
    return ", ".join(sorted(names)) or first[:60]


PAGES = {
    "licences": licences_page,
    "errors": errors_page,
    "settings": settings_page,
    "commands": commands_page,
    "ascend": ascend_page,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if they differ")
    options = parser.parse_args()
    os.environ |= {"COLUMNS": "88", "NO_COLOR": "1"}
    stale = []
    for name, make in PAGES.items():
        path = HERE / "reference" / f"{name}.md"
        text = HEAD + "\n".join(make()).rstrip() + "\n"
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(path.name)
            if not options.check:
                path.write_text(text, "utf-8")
    from danqing.report.document import Report

    schema = HERE / "reference" / "report.schema.json"
    text = json.dumps(Report.model_json_schema(), indent=1) + "\n"
    if not schema.exists() or schema.read_text("utf-8") != text:
        stale.append(schema.name)
        if not options.check:
            schema.write_text(text, "utf-8")
    if options.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run 'python docs/generate.py'")


if __name__ == "__main__":
    main()
