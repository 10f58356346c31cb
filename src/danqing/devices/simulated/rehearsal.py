"""`python -m danqing.devices.simulated.rehearsal`: runs a program on the simulated device.

What a real card of this kind would refuse, do on the host, or do otherwise is written down with
file and line. The program is a command of danqing, or a Python script.
"""

from __future__ import annotations

import argparse
import ast
import json
import runpy
import sys
import sysconfig
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType, TracebackType

STOPS = frozenset({"refused", "memory", "cuda", "missing", "failed"})
"""Kinds of findings that end a run; the others are warnings."""
_LIBRARIES = {"flash_attn", "xformers", "triton", "bitsandbytes", "apex", "deepspeed", "tensorrt"}
_SHOWN = 160
_HERE = str(Path(__file__).parent)
_STANDARD = (sysconfig.get_paths()["stdlib"], "<frozen", "<string>")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that would not go as on a CPU.

    Attributes:
        kind: `refused`, `memory`, `cuda`, `missing`, `failed`; or `host`, `double`, `source`.
        what: in words.
        place: file and line of the program; empty if it is not known.
        inside: file and line of the library it happened in, if that is another.
    """

    kind: str
    what: str
    place: str = ""
    inside: str = ""


class Rehearsal:
    """Listens while a program runs."""

    def __init__(self) -> None:
        """Nothing was found yet."""
        self.findings: list[Finding] = []

    def hear(self, kind: str, name: str) -> None:
        """Be told by the device what a real one would do otherwise."""
        what = {
            "host": f"aten::{name} has no kernel in torch_npu: it runs on the host's CPU",
            "double": "float64 on the device silently becomes float32",
        }[kind]
        place, inside = _places(_frames_below(sys._getframe(1)))  # noqa: SLF001
        self.findings.append(Finding(kind=kind, what=what, place=place, inside=inside))

    def caught(self, error: BaseException) -> None:
        """Take down what ended the program."""
        kind, what = _explain(error)
        place, inside = _places(_frames_of(error.__traceback__))
        self.findings.append(Finding(kind=kind, what=what, place=place, inside=inside))

    def run(self, words: list[str]) -> int:
        """Run a program to its end; return its exit code, 1 if it failed."""
        try:
            if words[0] in {"python", "python3"}:
                script, sys.argv = words[1], words[1:]
                self.findings += scan(script)
                sys.path.insert(0, str(Path(script).resolve().parent))
                runpy.run_path(script, run_name="__main__")
            else:
                sys.argv = ["danqing", *words]
                runpy.run_module("danqing", run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:  # noqa: BLE001 - whatever ends a program is a finding
            self.caught(error)
            return 1
        return 0


def _explain(error: BaseException) -> tuple[str, str]:
    """Say what kind of end this was."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    detail = next((line for line in lines if "EZ1001" in line), lines[0]).strip()
    text = str(error)
    if "out of memory" in text:
        return "memory", detail
    if "EZ1001" in text or "error code is 161002" in text:
        return "refused", f"{lines[0].split(' failed')[0]}: {detail}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _LIBRARIES:
        return "missing", f"{error.name} is for CUDA; there is none of it for an NPU"
    if "CUDA" in text or "cuda" in text or "NVIDIA" in text:
        return "cuda", detail[:_SHOWN]
    return "failed", f"{type(error).__name__}: {detail[:_SHOWN]}"


# --- where ---------------------------------------------------------------------------------------


def _frames_below(frame: FrameType | None) -> Iterator[tuple[str, int]]:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def _frames_of(trace: TracebackType | None) -> Iterable[tuple[str, int]]:
    return reversed([(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(trace)])


def _places(frames: Iterable[tuple[str, int]]) -> tuple[str, str]:
    """Return the innermost line of the program, and that of the library it called."""
    inside = ""
    for file, line in frames:
        if file.startswith((_HERE, *_STANDARD)) and "site-packages" not in file:
            continue
        if "site-packages" in file:
            library = file.split("site-packages/")[-1]
            if not inside and not library.startswith("torch/"):
                inside = f"{library}:{line}"
            continue
        return f"{file}:{line}", inside
    return "", inside


# --- the source ----------------------------------------------------------------------------------


def scan(script: str) -> list[Finding]:
    """Read a script for what is tied to CUDA; a run ends at the first of them, reading does not."""
    try:
        tree = ast.parse(Path(script).read_text("utf-8"), script)
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return []  # running it says what is wrong
    found = {
        (node.lineno, what)
        for node in ast.walk(tree)
        if isinstance(node, (ast.expr, ast.stmt)) and (what := _tied(node))
    }
    return [
        Finding(kind="source", what=what, place=f"{script}:{line}") for line, what in sorted(found)
    ]


def _tied(node: ast.AST) -> str:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "cuda":
            return ".cuda(): move to the device that was asked for"
        if node.func.attr == "double":
            return ".double(): an NPU has no float64; compute it on the CPU"
    if isinstance(node, ast.Attribute):
        return _attribute(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if node.value == "cuda" or node.value.startswith("cuda:"):
            return f'"{node.value}" is written into the program'
        return ""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    tied = sorted({name.split(".")[0] for name in names} & _LIBRARIES)
    return f"import of {', '.join(tied)}: for CUDA alone" if tied else ""


def _attribute(node: ast.Attribute) -> str:
    if not isinstance(node.value, ast.Name) or node.value.id != "torch":
        return ""
    return {
        "cuda": "torch.cuda: an NPU has torch.npu",
        "float64": "torch.float64: an NPU has none; compute it on the CPU",
        "double": "torch.double: an NPU has none; compute it on the CPU",
        "complex64": "torch.complex64: few kernels take it; use cosines and sines",
        "complex128": "torch.complex128: it runs on the host's CPU",
        "polar": "torch.polar: few kernels take complex numbers; use cosines and sines",
        "view_as_complex": "torch.view_as_complex: few kernels take it; use cosines and sines",
    }.get(node.attr, "")


# --- the process ---------------------------------------------------------------------------------


def main() -> None:
    """Run, write the findings to a file, and end as the program did."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chip", required=True)
    parser.add_argument("--memory", type=float)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--findings", type=Path, required=True)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    words = asked.words[1:] if asked.words[:1] == ["--"] else asked.words

    from danqing import devices
    from danqing.devices.simulated.install import install
    from danqing.errors import DanqingError

    devices.import_torch()
    try:
        simulation = install(asked.chip, devices=asked.devices, memory_gib=asked.memory)
    except DanqingError as error:
        sys.stderr.write(f"danqing: error: {error}\n")
        sys.exit(error.exit_code)
    rehearsal = Rehearsal()
    simulation.native.listen(rehearsal.hear)
    code = rehearsal.run(words)
    simulation.native.listen(None)
    asked.findings.write_text(json.dumps(_told(rehearsal, simulation, code)), "utf-8")
    sys.stdout.flush()
    sys.exit(code)


def _told(rehearsal: Rehearsal, simulation: Any, code: int) -> dict[str, Any]:
    counts = simulation.native.counts()
    return {
        "chip": simulation.chip.name,
        "exit_code": code,
        "findings": [asdict(one) for one in rehearsal.findings],
        "operators": len({name for name in counts if name.startswith("aten::")}),
        "totals": simulation.native.totals(),
        "memory": [simulation.native.memory(index) for index in range(simulation.devices)],
    }


if __name__ == "__main__":
    main()
