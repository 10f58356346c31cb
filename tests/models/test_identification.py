"""Which family a checkpoint is of, among those that share kinds of networks."""

from __future__ import annotations

import importlib
import shutil
from typing import TYPE_CHECKING

import pytest

from danqing import models
from danqing.errors import CheckpointError
from danqing.models import kinds
from danqing.weights.kinds import FOREIGN, KINDS
from tests import sd3_toys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_toys.write(tmp_path_factory.mktemp("toys") / "sd3")


def test_a_folder_is_of_its_family(schnell: Path, deepgen: Path, sd3: Path) -> None:
    for folder, family in ((schnell, "flux1"), (deepgen, "deepgen"), (sd3, "sd3")):
        (folder / "model_index.json").rename(folder / "kept")
        try:
            assert models.open_checkpoint(folder).family == family
        finally:
            (folder / "kept").rename(folder / "model_index.json")


def test_a_transformer_of_sd3_is_not_deepgens(sd3: Path, deepgen: Path, tmp_path: Path) -> None:
    """DeepGen has the same kind of transformer, but never without its connector."""
    for source in (sd3, deepgen):
        assert models.open_parts(source / "transformer").family == "sd3"
        file = next((source / "transformer").glob("*.safetensors"))
        checkpoint = models.open_checkpoint(shutil.copy(file, tmp_path / f"{source.name}.sft"))
        assert checkpoint.family == "sd3"
        assert models.identify(checkpoint).family == "sd3"
    assert models.open_parts(deepgen / "connector").family == "deepgen"
    assert models.open_parts(deepgen / "vlm").family == "deepgen"


def test_loose_files_of_sd3(sd3: Path, tmp_path: Path) -> None:
    """Both CLIPs are told apart by their sizes, and so are three tokenizers by their folders."""
    folder = tmp_path / "loose"
    original = models.open_checkpoint(sd3)
    for number, (name, part) in enumerate(original.components.items()):
        if part.files:
            (folder / str(number)).mkdir(parents=True)
            shutil.copy(part.files[0], folder / str(number) / "model.safetensors")
            shutil.copy(sd3 / name / "config.json", folder / str(number))
        else:
            shutil.copytree(part.folder, folder / name)
    transformer = original.components["transformer"].files[0]
    shutil.copy(transformer, folder / "x.safetensors")
    shutil.copy(sd3 / "transformer" / "config.json", folder)
    checkpoint = models.open_checkpoint(folder / "x.safetensors")
    assert checkpoint.family == "sd3"
    for name, part in original.components.items():
        found = checkpoint.components[name]
        assert {n: e.shape for n, e in found.entries.items()} == {
            n: e.shape for n, e in part.entries.items()
        }, name
    models.open_model(checkpoint, models.identify(checkpoint))


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_denoiser_elsewhere_that_cannot_be_read(
    schnell: Path, tmp_path: Path, *, missing: bool, whole: bool
) -> None:
    """Its own fault shows, whether or not the folder has one and whatever its index says."""
    folder = shutil.copytree(schnell, tmp_path / "model")
    if not whole:
        shutil.rmtree(folder / "transformer")
        (folder / "model_index.json").write_text("{}")
    place = tmp_path / "x.safetensors"
    if not missing:
        place.write_text("<html>")
    words = "nothing at the place of transformer" if missing else "web page"
    with pytest.raises(CheckpointError, match=words):
        models.open_checkpoint(folder, {"transformer": place})


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_kind_has_a_row(family: str) -> None:
    slots = importlib.import_module(models.FAMILIES[family]).SLOTS
    for slot in slots:
        kind = KINDS[slot.kind]
        assert kind.alias
        assert not any(naming.style == FOREIGN for naming in kind.namings)
        if slot.tokenizer:
            assert kind.tokenizer
        assert kind.denoiser == (slot.role == "denoiser")


def test_networks_that_can_be_made_can_be_recognised() -> None:
    assert {name.split("_projection")[0] for name in kinds.KINDS} <= KINDS.keys()


def test_names_of_kinds_are_unique() -> None:
    titles = [kind.title for kind in KINDS.values()]
    assert len(titles) == len(set(titles))
    aliases = [kind.alias for kind in KINDS.values() if not kind.denoiser]
    assert len(aliases) == len(set(aliases))
