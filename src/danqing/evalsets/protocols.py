"""One row a benchmark.

The settings are those DeepGen-1.0 was published with (its scripts/evaluation and EVAL.md): 512x512,
50 steps, guidance 4, seed 42; pictures to edit are stretched. Steps and guidance of another model
are its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a benchmark's pictures are made and named.

    Attributes:
        title: its name.
        prompt: keys under which a row may keep the prompt, the first that is there counts.
        key: keys under which a row may keep its own name; else its number in the file is taken.
        image: keys under which a row may keep the picture to edit; none if it paints from words.
        images: pictures of each prompt.
        rows: key of the list of rows in a JSON file; files without it are not read. None: a list,
            a table of rows by their keys, or a table with one list in it.
        file: name of each image's file: {key}, {number} (of the row, from 0), {index} (of the
            image, from 0), {stem} (of the prompts file), {folder} (it lies in), {group} (the
            key up to its second dash), and any key of the row.
        settings: beyond the common ones.
        grid: whether the pictures of a prompt are put into one, two by two.
        row: name of a file that gets the row itself, if the scorer wants one.
        source: name of a file that gets the picture to edit, if the scorer wants one.
    """

    title: str
    prompt: tuple[str, ...] = ("prompt",)
    key: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    images: int = 1
    rows: str | None = None
    file: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: bool = False
    row: str | None = None
    source: str | None = None

    @property
    def edits(self) -> bool:
        """Whether there are pictures to edit."""
        return bool(self.image)

    @property
    def common(self) -> dict[str, Any]:
        """Settings of all requests."""
        found: dict[str, Any] = {"height": 512, "width": 512, "seed": 42}
        if self.edits:
            found["resize"] = "stretch"
        return {**found, **self.settings}


PROTOCOLS: dict[str, Protocol] = {
    "geneval": Protocol(
        title="GenEval",
        images=4,
        file="{number:05d}/samples/{index:04d}.png",
        row="{number:05d}/metadata.jsonl",
    ),
    "dpg-bench": Protocol(
        title="DPG-Bench",
        key=("stem",),
        images=4,
        file="{key}.png",
        settings={"guidance_scale": 7.5},
        grid=True,
    ),
    "unigenbench": Protocol(
        title="UniGenBench",
        prompt=("prompt_en", "prompt", "prompt_zh"),
        key=("index",),
        images=4,
        file="{key}_{index}.png",
    ),
    "wise": Protocol(
        title="WISE", prompt=("Prompt", "prompt"), key=("prompt_id",), file="{key}.png"
    ),
    "t2i-corebench": Protocol(
        title="T2I-CoREBench",
        prompt=("Prompt", "prompt"),
        key=("ID", "id", "key"),
        images=4,
        file="{group}/{key}-{index}.png",
    ),
    "cvtg-2k": Protocol(
        title="CVTG-2K",
        key=("index", "id"),
        rows="data_list",  # beside each file lies the same as a table, in *_combined.json
        file="{folder}/{stem}/{key}.png",
    ),
    "imgedit": Protocol(
        title="ImgEdit",
        prompt=("prompt", "instruction"),
        key=("key",),
        image=("id", "image"),
        file="{key}.png",
    ),
    "gedit": Protocol(
        title="GEdit-Bench",
        prompt=("instruction", "prompt"),
        key=("key",),
        image=("input_image", "input_image_raw", "image"),
        file="fullset/{task_type}/{instruction_language}/{key}.png",
        source="fullset/{task_type}/{instruction_language}/{key}_SRCIMG.png",
    ),
    "rise": Protocol(
        title="RISEBench",
        prompt=("instruction", "prompt"),
        key=("index",),
        image=("image",),
        file="images/{category}/{key}.png",
    ),
    "unireditbench": Protocol(
        title="UniREditBench",
        prompt=("instruction", "prompt"),
        key=("idx", "id", "key"),
        image=("original_image_path", "input_image", "image"),
        file="{name}/{key}.png",
    ),
}
"""By the name on the command line."""
