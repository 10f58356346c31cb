"""Pinned versions, hashes and licences agree with each other and with what danqing needs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pinned(name: str) -> dict[str, str]:
    rows = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text("utf-8"), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in rows}


def needed() -> set[str]:
    """What danqing itself needs to run, and to serve."""
    found: set[str] = set()
    for row in metadata.requires("danqing") or ():
        need = Requirement(row)
        extras = ("", "serve")
        if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
            found.add(str(canonicalize_name(need.name)))
    return found - {"danqing"}


def test_every_locked_file_has_a_hash() -> None:
    blocks = re.split(
        r"^(?=\S+==)", (ROOT / "requirements.lock").read_text("utf-8"), flags=re.MULTILINE
    )
    assert len(blocks) > 50
    for block in blocks[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]


def test_the_lock_has_the_tested_versions() -> None:
    """`make hashes` writes it again after constraints.txt has changed."""
    locked, tested = pinned("requirements.lock"), pinned("constraints.txt")
    assert needed() <= set(locked)
    differing = {name for name in set(locked) & set(tested) if locked[name] != tested[name]}
    assert not differing


def test_every_dependency_has_its_licence_listed() -> None:
    page = (ROOT / "docs" / "reference" / "licences.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| ([\w.-]+) \| ([^|]+) \|", page, re.MULTILINE))
    assert needed() <= set(rows)
    assert "not stated" not in page
    assert not [name for name, licence in rows.items() if re.search(r"\bA?GPL\b", licence)]


def test_the_security_policy_is_linked() -> None:
    for readme in ("README.md", "README.zh.md"):
        assert "SECURITY.md" in (ROOT / readme).read_text("utf-8")


def test_bandit_finds_nothing() -> None:
    pytest.importorskip("bandit")
    command = [sys.executable, "-m", "bandit", "-q", "-c", "pyproject.toml", "-r", "src"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout
