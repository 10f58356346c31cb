"""Folders whose tokenizers were saved under other class names: they open all the same."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from danqing import models
from tests import deepgen_toys, toys

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("clip", "t5", "qwen")
CLASSES = (
    "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer",
    "evil.Tokenizer", None,
)  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tokenizers")
    toys.write_clip_tokenizer(home / "clip")
    toys.write_t5_tokenizer(home / "t5")
    deepgen_toys.write_tokenizer(home / "qwen")
    return home


@pytest.fixture(scope="module")
def saved(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers' own `save_pretrained` writes them."""
    from transformers import CLIPTokenizerFast, Qwen2TokenizerFast, T5TokenizerFast

    home = tmp_path_factory.mktemp("saved")
    for name, kind in (
        ("clip", CLIPTokenizerFast), ("t5", T5TokenizerFast), ("qwen", Qwen2TokenizerFast),
    ):  # fmt: skip
        kind.from_pretrained(originals / name).save_pretrained(home / name)
    return home


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def rename(folder: Path, name: str | None) -> None:
    """Let the config name another class, and leave tokenizer.json alone, as newer saves do."""
    path = folder / "tokenizer_config.json"
    table = json.loads(path.read_text())
    table.pop("tokenizer_class", None)
    if name is not None:
        table["tokenizer_class"] = name
    path.write_text(json.dumps(table))
    for file in ("vocab.json", "merges.txt", "spiece.model", "added_tokens.json"):
        (folder / file).unlink(missing_ok=True)


@pytest.mark.finding("U5")
@pytest.mark.parametrize("class_name", CLASSES)
def test_a_model_with_a_tokenizer_of_any_class_opens(
    schnell: Path, deepgen: Path, copy: Path, tmp_path: Path, class_name: str | None
) -> None:
    for source, names in (
        (schnell, {"tokenizer": "clip", "tokenizer_2": "t5"}), (deepgen, {"tokenizer": "qwen"}),
    ):  # fmt: skip
        folder = shutil.copytree(source, tmp_path / source.name)
        for name, kind in names.items():
            if class_name is not None or kind == "qwen":
                rename(copy / kind, class_name)
            shutil.rmtree(folder / name)
            shutil.copytree(copy / kind, folder / name)
        checkpoint = models.open_checkpoint(folder)
        models.open_model(checkpoint, models.identify(checkpoint))


@pytest.mark.finding("U5")
def test_a_generic_tokenizer_named_as_a_component(
    deepgen: Path, schnell_bfl: Path, copy: Path, tmp_path: Path
) -> None:
    for kind in KINDS:
        rename(copy / kind, "PreTrainedTokenizerFast")
    folder = shutil.copytree(deepgen, tmp_path / "deepgen")
    shutil.rmtree(folder / "tokenizer")
    for place, components in (
        (folder, {"tokenizer": copy / "qwen"}),
        (schnell_bfl, {"tokenizer": copy / "clip", "tokenizer_2": copy / "t5"}),
    ):
        checkpoint = models.open_checkpoint(place, components)
        models.open_model(checkpoint, models.identify(checkpoint))
