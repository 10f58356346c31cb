"""A server in a process of its own, as a user starts it, and one whose engine is a fake."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Running:
    """A server that runs, its address, and what it printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: deque[str] = deque(maxlen=5000)
        self.address = ""
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"danqing serves at (http://\S+)", line):
                self.address = found[1]
                self._ready.set()
        self._ready.set()

    def wait(self) -> Running:
        assert self._ready.wait(120), "".join(self.lines)
        assert self.address, "".join(self.lines)
        return self

    def logs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def stop(self, how: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[Running]:
    process = subprocess.Popen(
        [sys.executable, "-m", "danqing", "serve", "--port", "0", *map(str, arguments)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    running = Running(process)
    try:
        yield running.wait()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def pocket_server() -> Iterator[Running]:
    with serving("--no-page", "--device", "cpu") as server:
        yield server


@pytest.fixture(scope="session")
def deepgen_server(deepgen: Path) -> Iterator[Running]:
    with serving("--no-page", "--device", "cpu", "-m", deepgen, "--dtype", "float32") as server:
        yield server


@pytest.fixture
def http(pocket_server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pocket_server.address, timeout=60) as client:
        yield client


def until(condition: Any, seconds: float = 30.0) -> None:
    """Wait for something to become so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.02)
