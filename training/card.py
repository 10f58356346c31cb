"""Write the model card of the pocket model from its figures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_TEXT = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
language: [en, zh]
---

# danqing pocket

A FLUX.1 of {million:.1f} million parameters that paints small landscapes in ink and mineral colours, and plain geometric
scenes, at 128 x 128 pixels in 4 steps. It comes with danqing, as the model that is there when none is on the disk, and
as a measuring stick: a real FLUX.1 checkpoint, opened by the same code as the 12B one, whose pictures mean something.

An ordinary diffusers folder (`FluxPipeline` opens it), bfloat16, of the schnell kind: no guidance embedding, no shift of
the schedule, guidance built in.

| part | class | parameters |
|---|---|---|
{parts}

## What it can paint

One to four mountains in six colours, sun or moon with colour and place, lake or land, boats, trees, birds, a pavilion,
mist, times of day, seasons; or one to four of six shapes in eight colours on five grounds, with places, relations and
counts. English, and simple Chinese. `docs/guides/pocket.md` of danqing lists it all.

## What it cannot

Anything else: no people, no animals but birds, no letters, no photographs. Words it was never taught are spelled letter by
letter and mostly ignored (danqing names them). It reads 40 tokens. Sizes other than 128 x 128 were not trained. Chinese
signs are divided in another way by transformers 4 than by 5 in CLIP's tokenizer; both were trained, the pictures differ.

## Figures

Measured through danqing, on the CPU in the dtype it chooses, 4 steps, picture k with seed k, on prompts whose combination
of colours, shapes, places or counts was never in the training set (geometry) or whose scene was not (landscapes). A
program judges from the pixels; the last column is the same program on the painter's own pictures, where the truth is known.

| | right | of | % | judge on paintings, % |
|---|---|---|---|---|
{figures}

Mean distance between pictures of one prompt with different seeds, in levels of 255:
{diversity}.

## How it was made

By `python -m training` in danqing's repository, from nothing: no data set of pictures, nobody's weights. A program draws
scenes, paints them and writes sentences about them; 140,000 pictures, seeds fixed.{start}

| stage | steps | last loss |
|---|---|---|
{losses}

Licence: Apache-2.0.
"""
_START = """

It was made in two goes: an early version (1,000 steps of the text encoders, 2,900 of the autoencoder, 5,500 of the
transformer, 160 of its straightening), and from that one (`--start`) the steps below."""
_ROWS = {
    "colour": "geometry: colours of all things and the ground",
    "shape": "geometry: shapes, and how many",
    "relation": "geometry: everything in its place",
    "time": "landscape: day, dusk or night",
    "light": "landscape: sun or moon there, or not",
    "light's colour": "landscape: its colour",
    "mountains": "landscape: number of mountains",
    "boat": "landscape: a boat there, or not",
    "boats": "landscape: number of boats",
}
_CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
}


def write(checkpoint: Path, run: Path) -> None:
    """Write README.md into the checkpoint, from the files of a training run."""
    figures = json.loads((run / "figures.json").read_text("utf-8"))
    counts = {name: _parameters(checkpoint / name) for name in _CLASSES}
    text = _TEXT.format(
        million=sum(counts.values()) / 1e6,
        parts="\n".join(
            f"| `{name}` | {_CLASSES[name]} | {count:,} |" for name, count in counts.items()
        ),
        figures="\n".join(_figures(figures)),
        diversity=", ".join(f'{far} ("{prompt}")' for prompt, far in figures["diversity"].items()),
        start="" if (run / "text.jsonl").exists() else _START,
        losses="\n".join(_losses(run)),
    )
    (checkpoint / "README.md").write_text(text, "utf-8")


def _figures(figures: Mapping[str, Any]) -> Iterator[str]:
    judged = figures["judge on painted pictures"]
    for name, words in _ROWS.items():
        row = figures["adherence"]["right"][name]
        yield f"| {words} | {row['right']} | {row['of']} | {row['percent']:.1f} | {judged[name]['percent']:.1f} |"


def _losses(run: Path) -> Iterator[str]:
    for stage in ("text", "autoencoder", "flow", "straight"):
        if not (run / f"{stage}.jsonl").exists():  # it was taken from the start
            continue
        last = json.loads((run / f"{stage}.jsonl").read_text("utf-8").splitlines()[-1])
        yield f"| {stage} | {last['step']:,} | {last['loss']:.4f} |"


def _parameters(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                size = 1
                for side in file.get_slice(name).get_shape():
                    size *= side
                total += size
    return total
