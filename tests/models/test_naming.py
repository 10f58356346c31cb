"""Names of components: the family's slots give them, whatever the layout."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from danqing import models
from danqing.errors import CheckpointError, CheckpointIncompleteError, RequestError
from tests import layouts, toys
from tests.models.renamed_family import SLOTS

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.weights import Checkpoint

NETWORKS = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "vae")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let danqing know this family alone; with FLUX.1, see the last test."""
    for name in list(models.FAMILIES):
        monkeypatch.delitem(models.FAMILIES, name)
    monkeypatch.setitem(models.FAMILIES, "renamed", "tests.models.renamed_family")


@pytest.fixture(scope="module")
def wide_clip() -> layouts.State:
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**{**toys.CLIP, "hidden_size": 64}))
    return {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def states(schnell: Path, wide_clip: layouts.State) -> dict[str, layouts.State]:
    found = layouts.states(schnell)
    return {
        "unet": found["transformer"], "vae": found["vae"], "text_encoder": found["text_encoder"],
        "text_encoder_2": wide_clip, "text_encoder_3": found["text_encoder_2"],
    }  # fmt: skip


@pytest.fixture
def loose(states: dict[str, layouts.State], tmp_path: Path) -> Path:
    """Files whose names say nothing, in an order that says nothing either."""
    folder = tmp_path / "loose"
    for number, name in enumerate(("vae", "text_encoder_2", "text_encoder_3", "unet")):
        layouts.save(folder / f"{number}.safetensors", states[name])
    layouts.save(folder / "9.safetensors", states["text_encoder"])
    return folder


@pytest.fixture
def diffusers(schnell: Path, loose: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "diffusers"
    old = {"unet": "transformer", "text_encoder_3": "text_encoder_2",
           "tokenizer_2": "tokenizer", "tokenizer_3": "tokenizer_2"}  # fmt: skip
    index: dict[str, object] = {"_class_name": "RenamedPipeline"}
    for slot in SLOTS:
        source = schnell / old.get(slot.name, slot.name)
        if slot.name == "text_encoder_2":
            source = schnell / "text_encoder"
        shutil.copytree(source, folder / slot.name)
        library = "diffusers" if slot.name in ("unet", "vae", "scheduler") else "transformers"
        ending = {"tokenizer": "Tokenizer", "schedule": "Scheduler"}.get(slot.role, "Model")
        index[slot.name] = [library, f"Some{ending}"]
    shutil.copy(loose / "1.safetensors", folder / "text_encoder_2" / "model.safetensors")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def files(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: part.files[0].name for name, part in checkpoint.components.items() if part.files}


def test_loose_files_are_named_by_the_slots(loose: Path) -> None:
    """Of two CLIPs, the first slot has the smaller."""
    checkpoint = models.open_checkpoint(loose)
    assert checkpoint.layout == "BFL files"
    assert models.identify(checkpoint).title == "Renamed"
    assert files(checkpoint) == {
        "vae": "0.safetensors", "text_encoder_2": "1.safetensors",
        "text_encoder_3": "2.safetensors", "unet": "3.safetensors",
        "text_encoder": "9.safetensors",
    }  # fmt: skip
    assert checkpoint.component("unet").name == "unet"


def test_one_file_is_named_by_the_slots(states: dict[str, layouts.State], tmp_path: Path) -> None:
    prefixes = {
        "unet": layouts.COMFY, "vae": "vae.",
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    }  # fmt: skip
    state = {
        name: tensor
        for part, prefix in prefixes.items()
        for name, tensor in layouts.prefixed(prefix, states[part]).items()
    }
    checkpoint = models.open_checkpoint(layouts.save(tmp_path / "all.safetensors", state))
    assert {name: part.prefix for name, part in checkpoint.components.items()} == prefixes


def test_subfolders_are_the_slots(diffusers: Path) -> None:
    checkpoint = models.open_checkpoint(diffusers)
    assert checkpoint.components.keys() == {slot.name for slot in SLOTS}
    assert models.identify(checkpoint).title == "Renamed"
    assert checkpoint.component("unet").kind == "flux_transformer"
    for name, part in checkpoint.components.items():
        assert part.folder == diffusers / name


def test_components_lie_elsewhere(diffusers: Path, loose: Path, schnell: Path) -> None:
    for name in ("unet", "text_encoder_3", "tokenizer_3"):
        shutil.rmtree(diffusers / name)
    checkpoint = models.open_checkpoint(
        diffusers,
        {
            "unet": loose / "3.safetensors",
            "text_encoder_3": loose / "2.safetensors",
            "tokenizer_3": schnell / "tokenizer_2",
        },
    )
    assert files(checkpoint)["text_encoder_3"] == "2.safetensors"
    assert files(checkpoint)["unet"] == "3.safetensors"
    assert checkpoint.overrides["tokenizer_3"] == schnell / "tokenizer_2"
    assert models.identify(checkpoint).title == "Renamed"


@pytest.mark.parametrize(
    ("alias", "slot"), [("t5", "text_encoder_3"), ("dit", "unet"), ("vae", "vae")]
)
def test_an_alias_names_the_one_of_its_kind(
    diffusers: Path, loose: Path, alias: str, slot: str
) -> None:
    place = loose / f"{['vae', '', 'text_encoder_3', 'unet'].index(slot)}.safetensors"
    checkpoint = models.open_checkpoint(diffusers, {alias: place})
    assert checkpoint.components[slot].files == (place,)
    assert checkpoint.overrides == {slot: place}


@pytest.mark.parametrize("name", ["transformer", "clip", "text_encoder_4", "UNET"])
def test_an_unknown_name_is_refused_with_those_of_the_family(
    diffusers: Path, loose: Path, name: str
) -> None:
    """`clip` may be two of them, and the hint says so."""
    with pytest.raises(RequestError, match="unknown component") as caught:
        models.open_checkpoint(diffusers, {name: loose / "9.safetensors"})
    assert caught.value.seen == name
    allowed = str(caught.value.allowed).split(", ")
    assert {slot.name for slot in SLOTS} | {"t5", "dit", "schedule"} <= set(allowed)
    assert not {"transformer", "clip"} & set(allowed)
    hint = "clip may be text_encoder or text_encoder_2 here" if name == "clip" else None
    assert caught.value.hint == hint


def test_two_of_one_size_must_be_named(loose: Path) -> None:
    shutil.copy(loose / "9.safetensors", loose / "1.safetensors")
    with pytest.raises(CheckpointError, match="more than one text_encoder side by side") as caught:
        models.open_checkpoint(loose)
    assert "--component text_encoder=PLACE" in str(caught.value)
    given = {"text_encoder": loose / "9.safetensors", "text_encoder_2": loose / "1.safetensors"}
    assert files(models.open_checkpoint(loose, given)).keys() == set(NETWORKS)


def test_what_is_missing_is_named_as_the_slot(loose: Path) -> None:
    checkpoint = models.open_checkpoint(loose)
    for name, file in (("tokenizer_2", "merges.txt"), ("tokenizer_3", "spiece.model")):
        with pytest.raises(CheckpointIncompleteError, match=f"has no {name}") as caught:
            checkpoint.component(name)
        assert file in str(caught.value)
    (loose / "2.safetensors").unlink()
    checkpoint = models.open_checkpoint(loose)
    with pytest.raises(CheckpointIncompleteError, match="has no text_encoder_3"):
        checkpoint.component("text_encoder_3")


def test_a_pickle_is_named_as_the_slot(loose: Path, schnell: Path) -> None:
    (loose / "2.safetensors").unlink()
    folder = shutil.copytree(schnell / "text_encoder_2", loose / "t5")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="text_encoder_3 is there only as a Python pickle"):
        models.open_checkpoint(loose)


def test_families_are_ranked_by_the_slots_they_fill(
    loose: Path, schnell: Path, schnell_bfl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have FLUX.1's transformer; the order in the table means nothing."""
    flux = "danqing.models.flux"
    for names in (("flux1", "renamed"), ("renamed", "flux1")):
        for name in list(models.FAMILIES):
            monkeypatch.delitem(models.FAMILIES, name)
        for name in names:
            package = flux if name == "flux1" else "tests.models.renamed_family"
            monkeypatch.setitem(models.FAMILIES, name, package)
        for name in TOKENIZERS:
            source = schnell / ("tokenizer_2" if name == "tokenizer_3" else "tokenizer")
            shutil.copytree(source, loose / name, dirs_exist_ok=True)
        assert models.open_checkpoint(loose).family == "renamed"
        assert models.open_checkpoint(schnell).family == "flux1"
        assert models.open_checkpoint(schnell_bfl).family == "flux1"
        assert models.open_parts(schnell / "text_encoder_2").family == "flux1"
