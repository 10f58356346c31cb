"""How prompts and pictures are put before the language model: templates, token rows, positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from danqing.errors import CheckpointDamagedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FIELD = "{input}"
MAX_TEXT = 4000
"""Characters of each text of a template: the language model reads them with every prompt."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The words around a prompt; names are those of the model's prompt_template.json.

    Attributes:
        instruction: a whole turn.
        generation: a prompt without pictures.
        image_start: before a picture's tokens.
        image_token: one of a picture's tokens.
        image_end: behind them.
    """

    instruction: str = "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n"
    generation: str = "Generate an image: {input}"
    image_start: str = "<|vision_start|>"
    image_token: str = "<|image_pad|>"  # noqa: S105
    image_end: str = "<|vision_end|>"

    def row(self, prompt: str, image_tokens: Sequence[int]) -> str:
        """Return what the language model reads.

        Args:
            prompt: the user's words; blanks around them are dropped.
            image_tokens: how many tokens each picture takes; none for a picture from words alone.
        """
        text = prompt.strip()
        if not image_tokens:
            return self.instruction.replace(FIELD, self.generation.replace(FIELD, text))
        images = "".join(
            self.image_start + self.image_token * count + self.image_end for count in image_tokens
        )
        return self.instruction.replace(FIELD, f"{images}\n{text}")


KEYS = {
    "INSTRUCTION": "instruction",
    "GENERATION": "generation",
    "IMG_START_TOKEN": "image_start",
    "IMG_CONTEXT_TOKEN": "image_token",
    "IMG_END_TOKEN": "image_end",
}


def template_from(table: Mapping[str, Any], place: Path) -> Template:
    """Return the template that came with the weights; what it leaves out is the released one's.

    Raises:
        CheckpointDamagedError: an entry is no text, or has no place for the prompt.
    """
    found = {}
    for key, name in KEYS.items():
        text = table.get(key)
        if text is None:
            continue
        wants_field = name in ("instruction", "generation")
        if (
            not isinstance(text, str)
            or not 0 < len(text) <= MAX_TEXT
            or (wants_field and text.count(FIELD) != 1)
        ):
            raise CheckpointDamagedError(
                "the model's prompt template cannot be used",
                seen=f"{place}: {key} is {text!r}"[:200],
                allowed=f"a text of at most {MAX_TEXT} characters"
                + (f" with one {FIELD}" if wants_field else ""),
            )
        found[name] = text
    return Template(**found)


def positions(
    ids: torch.Tensor, image_token: int, grids: Sequence[tuple[int, int]], queries: int
) -> torch.Tensor:
    """Return the three positions of each token: time, row and column.

    Words take three equal positions, one after the other, and so do the queries behind them. A
    picture is one moment: its tokens keep the time at which it begins and count rows and columns
    from there; what follows goes on behind the largest of them (Qwen2.5-VL, arXiv 2502.13923).

    Args:
        ids: (tokens,), without padding.
        image_token: the id of a picture's token.
        grids: rows and columns of tokens of each picture, in the order they come.
        queries: how many tokens follow.

    Returns:
        (3, 1, tokens + queries), int64, on the CPU.
    """
    is_image = (ids == image_token).tolist()
    found: list[torch.Tensor] = []
    place, start, remaining = 0, 0, list(grids)
    while place < len(is_image):
        if is_image[place]:
            rows, columns = remaining.pop(0)
            moment = torch.zeros(rows * columns, dtype=torch.long)
            row = torch.arange(rows).repeat_interleave(columns)
            column = torch.arange(columns).repeat(rows)
            found.append(torch.stack([moment, row, column]) + start)
            place, start = place + rows * columns, start + max(rows, columns)
        else:
            found.append(torch.full((3, 1), start, dtype=torch.long))
            place, start = place + 1, start + 1
    found.append((torch.arange(queries) + start).expand(3, -1))
    return torch.cat(found, dim=1)[:, None]
