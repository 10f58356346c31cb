"""The docs are run: what they show works, what exists is shown."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from danqing import errors
from danqing.cli import app
from danqing.cli.options import flags, setting_names
from tests.marks import slow_among
from tests.serve.conftest import serving

ROOT = Path(__file__).parents[1]
DOCUMENTED_SERVER = "http://127.0.0.1:8000"
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.fixture
def models(
    schnell: Path, dev: Path, deepgen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folders the docs name, with toys in them."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "FLUX.1-schnell").symlink_to(schnell)
    (tmp_path / "models" / "FLUX.1-dev").symlink_to(dev)
    (tmp_path / "models" / "DeepGen-1.0").symlink_to(deepgen)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WITH_COMMANDS = [page for page in PAGES if any("danqing " in b for b in blocks(page, "bash"))]


LONG_PAGES = ("ascend.md", "report.md", "verify.md")
SLOW_PAGES = [page for page in PAGES if page.name.endswith(".zh.md") or page.name in LONG_PAGES]
"""The Chinese pages have the commands of the English ones."""


@pytest.mark.parametrize("page", slow_among(WITH_COMMANDS, SLOW_PAGES), ids=lambda page: page.name)
def test_commands_run(page: Path, models: Path) -> None:
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                words = shlex.split(command)
                if words[:1] != ["danqing"]:
                    continue
                result = CliRunner().invoke(app, words[1:])
                assert result.exit_code == 0, (line, result.stderr)


@pytest.mark.parametrize(
    "page",
    slow_among([p for p in PAGES if blocks(p, "python")], SLOW_PAGES),
    ids=lambda page: page.name,
)
def test_python_runs(page: Path, models: Path) -> None:
    for block in blocks(page, "python"):
        if DOCUMENTED_SERVER not in block:
            subprocess.run([sys.executable, "-c", block], check=True, cwd=models)
            continue
        with serving("--no-page", "--device", "cpu") as server:
            code = block.replace(DOCUMENTED_SERVER, server.address)
            subprocess.run([sys.executable, "-c", code], check=True, cwd=models)


def test_the_example_of_the_package_runs(models: Path) -> None:
    import danqing

    block = re.search(r"```python\n(.*?)```", danqing.__doc__ or "", re.DOTALL)
    assert block
    code = block[1].replace("seed=42", "seed=42, height=64, width=64")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=models)
    assert (models / "pizza.png").exists()


def test_every_flag_is_documented() -> None:
    text = (ROOT / "docs/reference/settings.md").read_text("utf-8")
    for name in setting_names():
        assert all(f"`{flag}`" in text for flag in flags(name)), name


def test_every_error_is_documented_with_its_code() -> None:
    text = (ROOT / "docs/reference/errors.md").read_text("utf-8")
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.DanqingError):
            assert f"`{kind.__name__}` | {kind.exit_code} | {kind.http_status} |" in text


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "ARCHITECTURE.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)


def gallery() -> dict[str, tuple[str, int]]:
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, tuple[str, int]] = module.GALLERY
    return found


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_the_gallery_is_told_in_the_readme(page: Path) -> None:
    text = page.read_text("utf-8")
    for name, (prompt, seed) in gallery().items():
        assert f"![{prompt}](docs/pictures/{name}.png)" in text
        assert f'"{prompt}" --seed {seed}`' in text


def test_the_gallery_can_be_painted_again() -> None:
    import danqing
    from danqing.verify.metrics import compare

    with danqing.open("pocket", device="cpu") as engine:
        for name, (prompt, seed) in gallery().items():
            with Image.open(ROOT / "docs" / "pictures" / f"{name}.png") as kept:
                # bit for bit where it was painted; another CPU has other last bits
                assert compare(engine.generate(prompt, seed=seed).image, kept).psnr > 30, name
