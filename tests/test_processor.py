"""C++ of ours is compiled once, and done without where it cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danqing import processor
from danqing.weights.unpacking import SOURCE

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int danqing_one() { return 1; }\n')
    assert processor.compiled(source).danqing_one() == 1
    (built,) = (tmp_path / "danqing" / "native").iterdir()
    assert [file.name for file in built.iterdir()] == ["kernels.so"]
    monkeypatch.setattr(processor, "_compile", None)  # not wanted any more
    processor.compiled.cache_clear()
    assert processor.compiled(source).danqing_one() == 1
    processor.compiled.cache_clear()


def test_without_a_compiler_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda _: None)
    processor.compiled.cache_clear()
    assert processor.compiled(SOURCE) is None
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda _: str(broken))
    processor.compiled.cache_clear()
    assert processor.compiled(SOURCE) is None
    assert "unpacking.cpp cannot be compiled" in capsys.readouterr().err
    assert not list((tmp_path / "danqing" / "native").iterdir())
    processor.compiled.cache_clear()
