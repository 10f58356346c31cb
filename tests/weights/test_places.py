"""Where an id of a hub is found on this disk, and what is said where it is not."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from danqing import models
from danqing.errors import CheckpointIncompleteError, CheckpointNotFoundError
from tests import layouts
from tests.conftest import call_danqing

if TYPE_CHECKING:
    from pathlib import Path

ID = "black-forest-labs/FLUX.1-schnell"


@pytest.fixture(autouse=True)
def _empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "DANQING_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))


@pytest.mark.parametrize("variable", ["default", "HF_HOME", "HF_HUB_CACHE"])
def test_hugging_face_cache(
    schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    cache = tmp_path / "home" / ".cache" / "huggingface" / "hub"
    if variable == "HF_HOME":
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        cache = tmp_path / "hf" / "hub"
    if variable == "HF_HUB_CACHE":
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "direct"))
        cache = tmp_path / "direct"
    snapshot = layouts.write_hub_cache(cache, ID, schnell)
    assert models.open_checkpoint(ID).path == snapshot


def test_the_hubs_own_client_finds_what_the_tests_write(schnell: Path, tmp_path: Path) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    cache = tmp_path / "hub"
    snapshot = layouts.write_hub_cache(cache, ID, schnell)
    assert [repo.repo_id for repo in scan_cache_dir(cache).repos] == [ID]
    found = try_to_load_from_cache(ID, "model_index.json", cache_dir=cache)
    assert found == str(snapshot / "model_index.json")


def test_the_revision_main_points_to_is_taken(schnell: Path, tmp_path: Path) -> None:
    cache = tmp_path / "home" / ".cache" / "huggingface" / "hub"
    snapshot = layouts.write_hub_cache(cache, ID, schnell)
    newer = snapshot.parent / ("f" * 40)
    newer.mkdir()
    assert models.open_checkpoint(ID).path == snapshot


@pytest.mark.parametrize(
    "inner",
    [
        "black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX___1-schnell",
        "models/black-forest-labs/FLUX___1-schnell", "hub/black-forest-labs/FLUX___1-schnell",
        "hub/models/black-forest-labs/FLUX.1-schnell",
    ],
)  # fmt: skip
def test_model_scope_cache(schnell: Path, tmp_path: Path, inner: str) -> None:
    shutil.copytree(schnell, tmp_path / "scope" / inner)
    assert models.open_checkpoint(ID).path == tmp_path / "scope" / inner


@pytest.mark.parametrize("inner", [ID, "FLUX.1-schnell"])
def test_named_folders_go_first(
    schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    layouts.write_hub_cache(tmp_path / "home" / ".cache" / "huggingface" / "hub", ID, schnell)
    shutil.copytree(schnell, tmp_path / "mine" / inner)
    monkeypatch.setenv("DANQING_MODELS", f"{tmp_path / 'none'}:{tmp_path / 'mine'}")
    assert models.open_checkpoint(ID).path == tmp_path / "mine" / inner


def test_every_place_searched_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANQING_MODELS", str(tmp_path / "mine"))
    with pytest.raises(CheckpointNotFoundError) as caught:
        models.open_checkpoint(ID)
    text = str(caught.value)
    for place in (
        tmp_path / "mine" / "black-forest-labs" / "FLUX.1-schnell",
        "huggingface/hub/models--black-forest-labs--FLUX.1-schnell",
        tmp_path / "scope" / "hub" / "models" / "black-forest-labs" / "FLUX___1-schnell",
        f"danqing pull {ID}",
    ):
        assert str(place) in text


def test_a_download_that_is_under_way_is_not_taken_for_whole(schnell: Path, tmp_path: Path) -> None:
    cache = tmp_path / "home" / ".cache" / "huggingface" / "hub"
    snapshot = layouts.write_hub_cache(cache, ID, schnell)
    file = next((snapshot / "transformer").glob("*.safetensors"))
    blob = file.resolve()
    file.unlink()
    blob.rename(blob.with_suffix(".incomplete"))
    checkpoint = models.open_checkpoint(ID)
    with pytest.raises(CheckpointIncompleteError, match="transformer"):
        checkpoint.component("transformer")


def test_models_are_listed(schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts.write_hub_cache(tmp_path / "home" / ".cache" / "huggingface" / "hub", ID, schnell)
    shutil.copytree(schnell, tmp_path / "mine" / "half")
    shutil.rmtree(tmp_path / "mine" / "half" / "vae")
    (tmp_path / "mine" / "letters").mkdir()
    monkeypatch.setenv("DANQING_MODELS", str(tmp_path / "mine"))
    rows = {row["name"]: row for row in json.loads(call_danqing("models", "--json").stdout)}
    assert rows["pocket"]["complete"]
    assert rows[ID]["model"] == "flux1-schnell"
    assert (rows[ID]["complete"], rows[ID]["dtype"]) == (True, "float32")
    assert not rows[str(tmp_path / "mine" / "half")]["complete"]
    shown = call_danqing("models").stdout
    assert "the checkpoint has no vae" in shown
    assert "1 other places hold no model" in shown
