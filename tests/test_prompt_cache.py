"""What prompts became, kept on disk: the same picture without a text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import danqing
from danqing.engine import conditions
from tests import deepgen_toys

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 1}


def paint(folder: Path, prompt: str = "a boat", **opening: Any) -> tuple[bytes, set[str]]:
    with danqing.open("pocket", device="cpu", prompt_cache=folder, **opening) as engine:
        picture = engine.generate(prompt, **SMALL)
        read = {cost.component for cost in picture.pictures[0].stages if cost.name == "load"}
        return picture.image.tobytes(), read


def test_a_prompt_that_comes_again_reads_no_encoder(tmp_path: Path) -> None:
    first, read = paint(tmp_path)
    again, read_again = paint(tmp_path)
    assert first == again
    assert read == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert read_again == {"transformer", "vae"}
    assert paint(tmp_path, "a mountain")[1] == read
    assert paint(tmp_path, dtype="float32")[1] == read  # other numbers: another entry
    assert len(list(tmp_path.iterdir())) == 3


def test_an_entry_that_is_damaged_is_made_again(tmp_path: Path) -> None:
    first, read = paint(tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-10])
    again, read_again = paint(tmp_path)
    assert (first, read) == (again, read_again)
    assert paint(tmp_path)[1] == {"transformer", "vae"}


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "KEPT", 2)
    for prompt in ("a boat", "a mountain", "a sun"):
        paint(tmp_path, prompt)
    assert len(list(tmp_path.iterdir())) == 2
    assert paint(tmp_path, "a sun")[1] == {"transformer", "vae"}


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("in the way")
    assert paint(place / "cache")[0] == paint(tmp_path / "cache")[0]


def test_pictures_to_edit_are_part_of_it(tmp_path: Path) -> None:
    from PIL import Image

    place = deepgen_toys.write(tmp_path / "deepgen")
    seen = []
    for colour in ("red", "blue", "red"):
        with danqing.open(place, device="cpu", prompt_cache=tmp_path / "cache") as engine:
            image = Image.new("RGB", (64, 64), colour)
            found = engine.generate("make it rain", image=[image], **SMALL).pictures[0]
            seen.append((found.pixels_sha256, found.stages[0].reused or found.stages[-1].reused))
            costs = [cost for cost in found.stages if cost.name == "encode"]
            assert costs[0].reused == (len(seen) == 3)
    assert seen[0][0] == seen[2][0] != seen[1][0]
