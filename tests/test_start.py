"""What starting costs: what is imported, and when."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def python(code: str) -> str:
    """Run code as a user would, without the tests' own setting that keeps libraries offline."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def modules_after(code: str) -> set[str]:
    return set(
        json.loads(
            python(f"{code}\nimport sys, json; print(json.dumps(list(sys.modules)))").splitlines()[
                -1
            ]
        )
    )


def test_importing_danqing_imports_no_torch() -> None:
    loaded = modules_after("import danqing")
    assert not loaded & {"torch", "numpy", "PIL", "pydantic", "diffusers", "transformers"}


def test_help_imports_no_torch() -> None:
    code = "import sys\nfrom danqing.cli import app\nfor words in (['--help'], ['generate', '--help']):\n"
    code += "    app(words, standalone_mode=False)"
    assert not modules_after(code) & {"torch", "numpy", "PIL", "diffusers", "transformers"}


def median_seconds(*command: str, times: int = 7) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@pytest.mark.slow  # a timing: run alone
def test_help_costs_little_more_than_its_libraries() -> None:
    bare = median_seconds(sys.executable, "-c", "import typer, rich, pydantic.main")
    ours = median_seconds(sys.executable, "-m", "danqing", "--help")
    assert ours - bare <= 0.15


def test_generate_imports_only_what_its_model_needs(schnell: Path) -> None:
    code = f"import danqing\ndanqing.open({str(schnell)!r}, device='cpu').generate('a cat', height=64, width=64)"
    loaded = modules_after(code)
    assert "diffusers.models.transformers.transformer_flux" in loaded
    # importing one of diffusers' transformers imports them all (0.1 s); its pipelines are lazy
    assert not [name for name in loaded if name.startswith("diffusers.pipelines.")]
    assert not [name for name in loaded if name.startswith("transformers.models.qwen")]
    # where scipy is installed, diffusers' scheduler imports it
    assert not loaded & {
        "fastapi",
        "gradio",
        "ray",
        "matplotlib",
        "sklearn",
        "pandas",
        "torchvision",
    }


def test_nothing_is_asked_of_the_network(schnell: Path) -> None:
    """An audit hook sees every connection and name look-up, whoever makes it."""
    code = f"""
import sys
asked = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        asked.append((event, str(arguments)))
sys.addaudithook(hook)
import danqing
with danqing.open({str(schnell)!r}, device="cpu") as engine:
    engine.generate("a cat", height=64, width=64)
assert not asked, asked
"""
    python(code)


def test_nothing_that_came_with_the_weights_is_run(schnell: Path, tmp_path: Path) -> None:
    """Code lying in the folder, asked for by its configs, stays unread."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(schnell, folder)
    trap = "from pathlib import Path\nPath(__file__).with_name('TRAP').touch()\n"
    for component in ("tokenizer", "tokenizer_2", "transformer", "text_encoder", "vae"):
        (folder / component / "trap.py").write_text(trap)
        for file in (folder / component).glob("*config.json"):
            table = json.loads(file.read_text())
            table["auto_map"] = {
                "AutoTokenizer": ["trap.Trap", "trap.Trap"],
                "AutoModel": "trap.Trap",
                "AutoConfig": "trap.Trap",
            }
            file.write_text(json.dumps(table))
    python(
        f"import danqing\ndanqing.open({str(folder)!r}, device='cpu').generate('a cat', height=64, width=64)"
    )
    assert not list(folder.rglob("TRAP"))
