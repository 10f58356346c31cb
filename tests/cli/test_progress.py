"""Progress as a person at a terminal sees it; records still go where standard output goes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def at_a_terminal(*arguments: object, stdin: str | None = None) -> tuple[int, str, str]:
    """Run with standard error on a pseudo-terminal; return code, standard output, terminal."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "danqing", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=child,
        text=True,
        env=environment,
    )
    os.close(child)
    shown = b""
    if stdin is not None and process.stdin:
        process.stdin.write(stdin)
    if process.stdin:
        process.stdin.close()
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    out = process.stdout.read() if process.stdout else ""
    return process.wait(), out, shown.decode()


def test_bars_on_a_terminal_and_json_elsewhere(schnell: Path, tmp_path: Path) -> None:
    arguments = ("a cat", "-m", schnell, "--size", "64x64", "--device", "cpu", "--num-images", 2)
    code, out, shown = at_a_terminal("generate", *arguments, "--json", "-o", tmp_path / "a.png")
    assert code == 0, shown
    assert len([json.loads(line) for line in out.splitlines()]) == 2
    assert "load transformer" in shown
    assert "s/step" in shown
    assert "\x1b[" in shown  # drawn, not printed line by line


def test_the_loop_between_bars(schnell: Path, tmp_path: Path) -> None:
    arguments = ("-m", schnell, "--loop", "--device", "cpu", "--size", "64x64")
    target = ("-o", tmp_path / "a.png")
    code, out, shown = at_a_terminal(
        "generate", *arguments, *target, stdin="a cat\n/seed 3\na dog\n"
    )
    assert code == 0, shown
    assert len(out.split()) == 2
    assert "seed 3" in shown
