"""The official JavaScript client against the server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.serve.conftest import Running

pytestmark = pytest.mark.enable_socket
MODULE = Path(sys.prefix) / "node_modules" / "openai" / "index.mjs"


@pytest.mark.skipif(
    shutil.which("node") is None or not MODULE.is_file(), reason="make javascript needs npm"
)
def test_the_javascript_client(pocket_server: Running, deepgen_server: Running) -> None:
    """Node is no part of danqing: without it the Python client alone stands for the API."""
    script = Path(__file__).with_name("client.mjs")
    ran = subprocess.run(
        ["node", script, MODULE, pocket_server.address, deepgen_server.address],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen == {
        "models": ["pocket"],
        "bytes": "PNG",
        "total": True,
        "events": ["image_generation.partial_image"] * 2 + ["image_generation.completed"],
        "same": True,
        "edited": "64x64",
        "errors": [
            ["BadRequestError", 400, "prompt", "invalid_value"],
            ["NotFoundError", 404, "model", "model_not_found"],
            ["BadRequestError", 400, "style", "unknown_parameter"],
            ["BadRequestError", 400, "n", "invalid_value"],
        ],
    }
