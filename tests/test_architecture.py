"""Boundaries that no linter covers."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from danqing.engine import Engine
    from danqing.models.base import ModelSpec
    from danqing.plan import Plan
    from danqing.runner import Probed, Setup, Spec

    # mypy holds the classes to the protocols that callers know
    RUNNER: type[Probed] = Engine
    SPEC: type[Spec] = ModelSpec
    SETUP: type[Setup] = Plan

SOURCE = Path(__file__).parents[1] / "src" / "danqing"
FILES = sorted(SOURCE.rglob("*.py"))
FAMILIES = {"cuda", "npu", "mps", "xpu"}


@pytest.mark.parametrize(
    "file", [f for f in FILES if "devices" not in f.parts], ids=lambda f: str(f.relative_to(SOURCE))
)
def test_accelerators_are_named_only_in_devices(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not (words | names) & FAMILIES


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_what_the_project_refuses(file: Path) -> None:
    text = file.read_text("utf-8")
    if file.name == "pickle_file.py":  # the one file a user may name, and say so
        text = text.replace('torch.load(path, map_location="cpu", weights_only=True,', "")
    if file.name == "config_tables.py":  # names it among the keys that never reach a library
        text = text.replace('"trust_remote_code"', "")
    # said aloud: left out, transformers asks at the terminal whether to run the folder's code
    text = text.replace("trust_remote_code=False", "")
    for word in ("trust_remote_code", "torch.load(", "pickle.load", "strict=False", "import *"):
        assert word not in text, word


def test_every_package_row_exists() -> None:
    """Rows name modules by strings: a typo must not wait for a user to find it."""
    import importlib

    from danqing import devices, models

    for row in devices.FAMILIES.values():
        module, _, name = row.partition(":")
        assert getattr(importlib.import_module(module), name).family in devices.FAMILIES
    for package in models.FAMILIES.values():
        found = importlib.import_module(package)
        assert callable(found.identify)
        module, _, name = found.MODEL.partition(":")
        assert getattr(importlib.import_module(module), name).slots == found.SLOTS


# --- imports in a circle -------------------------------------------------------------------------


def _modules() -> dict[str, Path]:
    names = {file: file.relative_to(SOURCE.parent).with_suffix("") for file in FILES}
    return {".".join(name.parts).removesuffix(".__init__"): file for file, name in names.items()}


def _imports(file: Path, modules: Container[str]) -> set[str]:
    """Return the modules that a file imports: at its top, in functions, and for types."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in modules else node.module)
    return {name for name in names if name in modules}


def _reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    """A package may name its own modules, as a row of `FAMILIES` does; import-linter sees the rest.

    Imports for types count as well: two modules that need each other's types are one subject.
    """
    modules = _modules()
    graph = {
        name: {other for other in _imports(file, modules) if not other.startswith(f"{name}.")}
        for name, file in modules.items()
    }
    reachable = {name: _reachable(name, graph) for name in graph}
    circles = {
        (name, other)
        for name in graph
        for other in reachable[name]
        if name < other and name in reachable[other]
    }
    assert not circles
