"""`danqing check` tells what is wrong before anything is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from danqing.weights import digests
from tests import layouts
from tests.conftest import call_danqing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHARD = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(schnell: Path, tmp_path: Path) -> Path:
    return shutil.copytree(schnell, tmp_path / "model")


def report(*arguments: object, code: int = 0) -> dict[str, Any]:
    child = call_danqing("check", *arguments, "--json")
    assert child.returncode == code, child.stderr
    assert "Traceback" not in child.stderr
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def test_a_sound_folder(schnell: Path) -> None:
    found = report(schnell)
    assert found["sound"] is True
    assert found["model"] == "flux1-schnell"
    rows = {row["name"]: row for row in found["components"]}
    assert all(row["ok"] for row in rows.values())
    assert rows["transformer"]["dtype"] == "float32"
    assert rows["transformer"]["bytes"] == 4 * 468_864  # parameters, facts of this toy
    text = call_danqing("check", schnell).stdout
    assert "sound: " in text
    assert "tokenizer_2" in text


def test_the_built_in_model() -> None:
    assert report("pocket")["model"] == "pocket"


def test_a_single_component(schnell: Path, schnell_bfl: Path, tmp_path: Path) -> None:
    for place, name in (
        (schnell_bfl / "ae.safetensors", "vae"),
        (schnell / "text_encoder_2", "text_encoder_2"),
    ):
        found = report(place)
        assert (found["sound"], found["model"]) == (True, None)
        assert [row["name"] for row in found["components"] if row["files"]] == [name]
    state = layouts.states(schnell)["vae"]
    state.pop("decoder.conv_out.bias")
    found = report(layouts.save(tmp_path / "vae.safetensors", state), code=3)
    assert "not those of its architecture" in found["components"][0]["fault"]["what"]


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a pointer": ("vae/diffusion_pytorch_model.safetensors", pointer, "Git LFS pointer"),
    "a page": (SHARD, lambda path: path.write_text("<!DOCTYPE html><html>"), "web page"),
    "half": (SHARD, lambda path: path.write_bytes(path.read_bytes()[:-9]), "cut short"),
    "no vocabulary": ("tokenizer_2/spiece.model", lambda path: path.unlink(), "vocabulary"),
    "no file": ("text_encoder/model.safetensors", lambda path: path.unlink(), "no weights file"),
    "a pickle": (
        "text_encoder/model.safetensors",
        lambda path: path.write_bytes(b"\x80\x04" + bytes(99)),
        "pickle",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_one_faulty_component_among_sound_ones(copy: Path, kind: str) -> None:
    place, change, words = DAMAGE[kind]
    change(copy / place)
    found = report(copy, code=3)
    assert found["sound"] is False
    faulty = {row["name"]: row["fault"]["what"] for row in found["components"] if not row["ok"]}
    if found["model"] is not None:
        assert list(faulty) == [place.split("/")[0]]
    assert any(words in what for what in [*faulty.values(), (found["fault"] or {}).get("what", "")])
    child = call_danqing("check", copy)
    assert child.returncode == 3
    assert words in child.stdout + child.stderr


def test_values_that_are_not_finite(copy: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(copy / SHARD)
    state["x_embedder.bias"][3] = torch.nan
    layouts.save(copy / SHARD, state)
    assert report(copy)["sound"] is True
    found = report(copy, "--check-values", code=3)
    (row,) = [row for row in found["components"] if not row["ok"]]
    assert row["fault"]["seen"] == "1 tensors, the first is x_embedder.bias: 1"


def test_digests_are_kept_until_the_file_changes(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = copy / SHARD
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert report(copy, "--digest")["sha256"][str(path)] == wanted
    assert digests.cached_sha256(path) == wanted
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p, rsync and tar do
    assert digests.cached_sha256(path) is None
    assert digests.sha256(path) == hashlib.sha256(data).hexdigest()
    os.utime(path, ns=(1, 1))
    assert digests.cached_sha256(path) is None


def test_a_published_file_is_recognised(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    published = next(iter(digests.KNOWN))
    path = (copy / SHARD).resolve()
    found = path.stat()
    digests.cache_file().parent.mkdir()
    row = {str(path): [found.st_size, found.st_mtime_ns, found.st_ctime_ns, published]}
    digests.cache_file().write_text(json.dumps(row))
    text = call_danqing("check", copy, "--digest").stdout
    assert "FLUX.1-schnell, as published" in text
