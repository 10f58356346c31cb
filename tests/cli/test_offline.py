"""Outside `pull` nothing uses the network; `--offline-proof` says so, and would notice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from danqing.cli.offline import offline_proof
from tests.conftest import run_danqing

if TYPE_CHECKING:
    from pathlib import Path

CODE = """
import socket
from danqing.cli.offline import offline_proof
from danqing.errors import DownloadError
try:
    with offline_proof():
        try:
            {what}
        except OSError:
            pass  # as a library might
except DownloadError as error:
    print("caught:", error.seen)
"""


def test_painting_reaches_no_host(schnell: Path, tmp_path: Path) -> None:
    """With the hub's libraries not told to stay offline, from the first import to the picture."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))
    }
    for place in ("pocket", str(schnell)):
        child = run_danqing(
            "generate", "a cat", "-m", place, "--offline-proof", "--seed", 1, "--size", "64x64",
            "-o", tmp_path / "{model}.png", "-q", env=environment,
        )  # fmt: skip
        assert child.returncode == 0, child.stderr


@pytest.mark.parametrize(
    "what", ["socket.socket().connect(('127.0.0.1', 9))", "socket.getaddrinfo('localhost', 80)", "import urllib.request; urllib.request.urlopen('http://localhost:9')"]
)  # fmt: skip
def test_an_attempt_is_noticed_though_its_error_is_swallowed(what: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CODE.format(what=what)], capture_output=True, text=True, check=True
    )
    assert child.stdout.startswith("caught: socket.")


def test_a_socket_of_this_machine_alone_is_no_network() -> None:
    with offline_proof():
        first, second = socket.socketpair(socket.AF_UNIX)
        first.close()
        second.close()


def test_afterwards_sockets_work_again() -> None:
    code = CODE.format(what="pass") + "socket.socket().close(); print('open')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "open\n"
