"""Ctrl-C, kill and full disks, with real signals to real processes: never half a picture."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.conftest import run_danqing

if TYPE_CHECKING:
    from pathlib import Path

LONG = ("--steps", 1000, "--size", "256x256", "--device", "cpu")


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "danqing", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def wait_for(child: subprocess.Popen[str], words: str) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        if words in line:
            return
    raise AssertionError(f"{words!r} was never said")


@pytest.mark.parametrize(
    ("number", "code", "words", "placement"),
    [
        (signal.SIGINT, 130, "danqing: interrupted", "resident"),
        (signal.SIGTERM, 143, "danqing: terminated", "resident"),
        pytest.param(signal.SIGKILL, -9, "", "resident", marks=pytest.mark.slow),
        (signal.SIGINT, 130, "danqing: interrupted", "streamed"),
        (signal.SIGKILL, -9, "", "streamed"),
    ],
)
def test_signals_in_the_middle_of_denoising(
    number: signal.Signals, code: int, words: str, placement: str, schnell: Path, tmp_path: Path
) -> None:
    arguments = ("-m", schnell, "-o", "out.png", "--placement", placement, *LONG)
    child = start("generate", "a cat", *arguments, cwd=tmp_path)
    wait_for(child, "denoise picture 0")
    child.send_signal(number)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == code
    assert words in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_pictures_finished_before_ctrl_c_stay(schnell: Path, tmp_path: Path) -> None:
    lines = '{"prompt": "a cat", "num_inference_steps": 1}\n{"prompt": "a dog"}\n'
    (tmp_path / "prompts").write_text(lines)
    arguments = ("--prompts-file", "prompts", "-m", schnell, "-o", "out-{seed}.png", "--seed", 1)
    child = start("generate", *arguments, *LONG, cwd=tmp_path)
    wait_for(child, "out-1.png: ")
    wait_for(child, "denoise picture 0")
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "1 of 2 pictures were saved" in errors
    assert Image.open(tmp_path / "out-1.png").size == (256, 256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-1.png", "prompts"]


KILLED_WHILE_WRITING = """
import os, signal, sys
from PIL import Image
from danqing import pictures
moment, path = sys.argv[1:]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
setattr(os, moment, die)
pictures.save(Image.new("RGB", (64, 64)), {}, path)
"""


@pytest.mark.parametrize("moment", ["fsync", "link"])
def test_killed_while_writing(moment: str, tmp_path: Path) -> None:
    """What may be left is a hidden .part file, never something that looks like a picture."""
    path = tmp_path / "out.png"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, moment, str(path)]
    assert subprocess.run(command, check=False).returncode == -9
    assert not path.exists()
    assert all(file.name.startswith(".danqing-") for file in tmp_path.iterdir())


def test_a_file_size_limit_is_like_a_full_disk(schnell: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))  # the tokenizers are smaller

    arguments = ("-m", schnell, "-o", "out.png", "--size", "512x512", "--device", "cpu", "-q")
    child = run_danqing("generate", "a cat", *arguments, cwd=tmp_path, preexec_fn=limit)
    assert child.returncode == 7, child.stderr
    assert "larger than this process may write" in child.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 64 KiB, mounted for the test alone."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only the superuser may mount a small disk")
    return place


@pytest.mark.slow
def test_a_full_disk(schnell: Path, small_disk: Path) -> None:
    arguments = ("-m", schnell, "--device", "cpu", "-o", "out.png")
    try:
        early = run_danqing("generate", "a cat", "--size", "512x512", *arguments, cwd=small_disk)
        settings = ("--size", "96x96", "--steps", 400, "--placement", "streamed")
        child = start("generate", "a cat", *settings, *arguments, cwd=small_disk)
        wait_for(child, "denoise picture 0")
        (small_disk / "ballast").write_bytes(b"x" * 50_000)  # now somebody else fills the disk
        _, late = child.communicate(timeout=150)
        names = [path.name for path in small_disk.iterdir()]
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)
    assert early.returncode == 7
    assert "no room for the picture" in early.stderr
    assert child.returncode == 7, late
    assert "the disk is full" in late
    assert names == ["ballast"]


@pytest.mark.slow
def test_a_full_disk_under_the_cache_costs_speed_alone(
    schnell: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels cannot be compiled there, nor rates and digests kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    arguments = ("-m", schnell, "--device", "cpu", "-o", "out.png", "--size", "64x64")
    try:
        (small_disk / "ballast").write_bytes(b"x" * (64 << 10))
        settings = ("--dtype", "bfloat16", "--placement", "streamed")
        child = run_danqing("generate", "a cat", *settings, *arguments, cwd=tmp_path)
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)
    assert child.returncode == 0, child.stderr
    assert Image.open(tmp_path / "out.png").size == (64, 64)


def test_output_closed_early_is_no_bug(schnell: Path, tmp_path: Path) -> None:
    arguments = f"generate 'a cat' -m {schnell} -o out.png --size 64x64 --device cpu -q"
    command = f"{sys.executable} -m danqing {arguments} | true"
    child = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert "Traceback" not in child.stderr
    assert "bug" not in child.stderr
