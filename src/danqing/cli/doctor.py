"""`danqing doctor`: what this machine has, what is missing, and how to get it.

Everything that could be broken is looked at in a child process, so that a library that cannot be
imported, or that kills the process, is a line in the report.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.cli.options import arguments
from danqing.cli.terminal import print_json
from danqing.devices import BACKENDS
from danqing.devices.cpu import host_memory, shown_flags
from danqing.errors import InstallationError, NoEffectError
from danqing.processor import cpu_model
from danqing.version import __version__

if TYPE_CHECKING:
    from danqing.cli.jobs.doctor import Examination

LIBRARIES = (
    "torch", *BACKENDS.values(), "diffusers", "transformers", "tokenizers", "safetensors",
    "sentencepiece", "numpy", "pillow", "pydantic", "typer", "rich", "gguf", "huggingface_hub",
    "accelerate", "modelscope",
)  # fmt: skip
_OPTIONAL = {*BACKENDS.values(), "accelerate", "modelscope"}
_CPU = "import danqing.devices as d; d.select('cpu'); "
_CHECKS = {
    "networks": _CPU + "from diffusers import FluxTransformer2DModel, AutoencoderKL",
    "text encoders": _CPU
    + "from transformers import CLIPTextModel, T5EncoderModel, T5TokenizerFast",
    "weights": "from safetensors import safe_open",
    "pictures": "from PIL import Image, features; assert features.check('webp')",
}
_SECONDS = 180
_ERROR_LINE = re.compile(r"[A-Za-z_][\w.]*(:|$)")
_GIB = 2**30


def run(job: Examination) -> None:
    """Print the report; the exit code is 0 as long as the CPU can paint, else 8."""
    import typer

    unused = arguments(job.options) + ([] if job.keep is None else ["--keep", job.keep])
    if unused:
        raise NoEffectError(f"{unused[0]} has no effect without --paint", seen=" ".join(unused))
    report = examine()
    if job.as_json:
        print_json(report, indent=2)
    else:
        for line in lines(report):
            print(line)
    if not report["usable"]:
        raise typer.Exit(InstallationError.exit_code)


def examine() -> dict[str, Any]:
    """Return the report as JSON types; never raises."""
    imports = {name: _try_import(code) for name, code in _CHECKS.items()}
    survey = _survey()
    devices = survey.get("devices", {})
    usable = bool(devices.get("cpu", {}).get("count")) and not any(imports.values())
    return {
        "danqing": __version__,
        "usable": usable,
        "system": _system(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "imports": {name: fault or "ok" for name, fault in imports.items()},
        "torch": survey.get("torch", {}),
        "devices": devices,
        "problems": _problems(imports, survey),
    }


def _system() -> dict[str, Any]:
    memory = host_memory()
    disk: int | None = None
    with contextlib.suppress(OSError):
        disk = shutil.disk_usage(Path.cwd()).free
    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cpu_features": shown_flags(),
        "memory_bytes": memory.total_bytes if memory else None,
        "memory_free_bytes": memory.free_bytes if memory else None,
        "disk_free_bytes": disk,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except Exception:  # noqa: BLE001 - damaged metadata raises anything
        return None


def _child(arguments: list[str]) -> tuple[str, str | None]:
    """Run Python in a child; return its output and, if it failed, in one line why."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        child = subprocess.run(  # noqa: S603 - our own interpreter and code
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env=environment,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return "", str(error)
    if child.returncode == 0:
        return child.stdout, None
    if child.returncode < 0:
        return child.stdout, f"killed by signal {-child.returncode}"
    return child.stdout, _last_words(child.stderr) or f"exit status {child.returncode}"


def _last_words(text: str) -> str:
    """Return the error a traceback ends with, which may have several lines, as one."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if _ERROR_LINE.match(line)]
    return "; ".join(line.strip() for line in lines[starts[-1] if starts else -1 :])


def _try_import(code: str) -> str | None:
    return _child(["-c", code])[1]


def _survey() -> dict[str, Any]:
    output, fault = _child(["-m", "danqing.devices.survey"])
    for line in output.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(line)
                return found
    return {"fault": fault or "the survey of devices said nothing"}


def _problems(imports: dict[str, str | None], survey: dict[str, Any]) -> list[dict[str, str]]:
    """Return what keeps danqing from working, each with what to do."""
    problems = []
    if fault := survey.get("fault"):
        hint = "install danqing with its constraints.txt in a fresh virtual environment"
        problems.append({"what": f"torch: {fault}", "hint": hint})
    for name, reason in imports.items():
        if reason:
            hint = "pip install --force-reinstall of that library, or a fresh virtual environment"
            problems.append({"what": f"{name}: {reason}", "hint": hint})
    return problems


def lines(report: dict[str, Any]) -> list[str]:
    """Return the report for people."""
    system = report["system"]
    features = ", ".join(system["cpu_features"]) or "none that matter"
    rows = [
        ("danqing", f"{report['danqing']}, Python {system['python']}, {system['os']}"),
        ("processor", f"{system['cpu']}, {system['cores']} cores ({features})"),
        ("memory", f"{_gib(system['memory_bytes'])}, {_gib(system['memory_free_bytes'])} free"),
        ("disk", f"{_gib(system['disk_free_bytes'])} free here"),
    ]
    text = [f"{label:<12} {value}" for label, value in rows]
    text += ["", "libraries"]
    for name, version in report["versions"].items():
        absent = "not installed (optional)" if name in _OPTIONAL else "MISSING"
        text.append(f"  {name:<14} {version or absent}")
    text += ["", "devices"]
    for family, found in report["devices"].items():
        text += _device_lines(family, found)
    text.append("")
    for problem in report["problems"]:
        text += [f"problem: {problem['what']}", f"  hint: {problem['hint']}"]
    verdict = "this machine can paint" if report["usable"] else "danqing cannot work here yet"
    return [*text, f"{verdict}; --device auto takes {_auto(report) or 'nothing'}"]


def _device_lines(family: str, found: dict[str, Any]) -> list[str]:
    if not found["count"]:
        text = [f"  {family:<6} no: {found['reason']}"]
        return [*text, f"         hint: {found['hint']}"] if found.get("hint") else text
    text = []
    for device in found["devices"]:
        memory = f", {_gib(device['memory_bytes'])}" if device["memory_bytes"] else ""
        dtypes = ", ".join(f"{name} {how}" for name, how in device["dtypes"].items())
        text.append(f"  {device['name']:<6} {device['chip']}{memory}; {dtypes}")
    return text


def _auto(report: dict[str, Any]) -> str | None:
    return next((name for name, found in report["devices"].items() if found["count"]), None)


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / _GIB:.1f} GiB"
