"""DeepGen-1.0's original checkpoint: one `.pt` with connector, transformer and adapters.

Its language model is stock Qwen2.5-VL with low-rank adapters beside it; both, and the autoencoder,
come from elsewhere. The adapters are merged while the language model's tensors are read.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from danqing.errors import CheckpointDamagedError, CheckpointIncompleteError, UnknownModelError
from danqing.weights.checkpoint import Adapter, Component
from danqing.weights.contents import Contents
from danqing.weights.kinds import KINDS
from danqing.weights.pickle_file import PickleFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from danqing.weights.tensor_file import TensorEntry

LAYOUT = "DeepGen .pt"
SCALE = 2.0
"""Of the adapters: alpha 128 over rank 64."""
_CONNECTOR = ("meta_queries", "projector_", "connector.")
_UNUSED = ("vae.", "ema.")
_SUFFIXES = {
    ".lora_A.default.weight": ("low", False),
    ".lora_B.default.weight": ("high", False),
    ".lora_embedding_A.default": ("high", True),
    ".lora_embedding_B.default": ("low", True),
}
"""What each tensor of an adapter is: a weight gains `high @ low`; an embedding's two are stored the
other way round, and each on its side."""
_OUTER = re.compile(r"^(module\.|model\.)+")
_LMM = re.compile(r"^lmm\.(base_model\.model\.)?(model\.)?")
_HEAD = "lm_head"


def read_deepgen_pt(place: Path) -> Contents:
    """Return the components in the file, and the adapters by the language model's layer.

    Raises:
        UnknownModelError: the file is of another model.
        CheckpointDamagedError: an adapter is not whole.
    """
    file = PickleFile(place)
    names = {_without_outer(name, file.entries): name for name in file.entries}
    if "meta_queries" not in names or not any(name.startswith("transformer.") for name in names):
        raise UnknownModelError(
            "the file is no DeepGen checkpoint",
            seen=f"{place}: {len(names)} tensors, such as {', '.join(list(names)[:3])}",
            allowed="one with meta_queries, connector.*, projector_*, transformer.* and lmm.*",
        )
    connector = {name: old for name, old in names.items() if name.startswith(_CONNECTOR)}
    transformer = {
        name.removeprefix("transformer."): old
        for name, old in names.items()
        if name.startswith("transformer.")
    }
    adapters = _adapters(file, {n: old for n, old in names.items() if n.startswith("lmm.")})
    known = (*_CONNECTOR, *_UNUSED, "transformer.", "lmm.")
    if odd := [name for name in names if not name.startswith(known)]:
        raise UnknownModelError(
            "the file holds tensors that no DeepGen has",
            seen=f"{place}: {len(odd)}, such as {odd[0]}",
        )
    parts = (
        _component("deepgen_connector", "deepgen", file, connector),
        _component("sd3_transformer", "diffusers", file, transformer),
    )
    return Contents(path=place, layout=LAYOUT, loose=parts, adapters={"qwen_vl": adapters})


def with_adapters(vlm: Component, adapters: Mapping[str, Adapter]) -> Component:
    """Return the language model with each adapter beside the weight it changes.

    Raises:
        CheckpointIncompleteError: an adapter's weight is not there, or is of another shape.
    """
    found = {}
    for layer, adapter in adapters.items():
        name = next((one for one in _spellings(layer) if one in vlm.entries), None)
        if name is None or vlm.entries[name].shape != adapter.shape:
            raise CheckpointIncompleteError(
                "an adapter does not fit the language model",
                seen=f"{layer}: {adapter.shape}"
                + ("" if name is None else f", the weight is {vlm.entries[name].shape}"),
                allowed="Qwen2.5-VL-3B-Instruct as it was released",
            )
        found[name] = adapter
    return replace(vlm, adapters=found)


def _without_outer(name: str, names: Iterable[str]) -> str:
    """Drop what a training program put before every name."""
    bare = _OUTER.sub("", name)
    return bare if "meta_queries" not in names else name


def _component(kind: str, style: str, file: PickleFile, renamed: Mapping[str, str]) -> Component:
    entries: dict[str, TensorEntry] = {new: file.entries[old] for new, old in renamed.items()}
    return Component(
        name=KINDS[kind].shown,
        style=style,
        folder=file.path.parent,
        files=(file.path,),
        given=(file, entries),
        kinds=(kind,),
    )


def _adapters(file: PickleFile, names: Mapping[str, str]) -> dict[str, Adapter]:
    halves: dict[str, dict[str, tuple[TensorEntry, bool]]] = {}
    for name, old in names.items():
        suffix = next((one for one in _SUFFIXES if name.endswith(one)), None)
        layer = _LMM.sub("", name.removesuffix(suffix or ""))
        if suffix is None:
            if ".base_layer." in name or _HEAD in name:
                continue
            raise UnknownModelError(
                "the file holds parts of a language model that are no adapters",
                seen=f"{file.path}: {old}",
                allowed="adapters (lora_A, lora_B, lora_embedding_A, lora_embedding_B)",
            )
        if layer != _HEAD:  # tied to the embeddings and never trained: merged it would spoil them
            half, turned = _SUFFIXES[suffix]
            halves.setdefault(layer, {})[half] = file.entries[old], turned
    found = {}
    for layer, both in halves.items():
        if set(both) != {"low", "high"}:
            raise CheckpointDamagedError(
                "an adapter has only one of its two tensors", seen=f"{file.path}: {layer}"
            )
        (low, turned), (high, _) = both["low"], both["high"]
        found[layer] = Adapter(file=file, low=low, high=high, turned=turned, scale=SCALE)
    return found


def _spellings(layer: str) -> tuple[str, ...]:
    """Return how releases name a layer's weight: with transformers' names of since 4.52, or before.

    The adapters' own names are of either kind too: `language_model.layers.0...`, `layers.0...`.
    """
    inner = layer.removeprefix("language_model.")
    if inner.startswith("visual."):
        return f"model.{inner}.weight", f"{inner}.weight"
    return f"model.language_model.{inner}.weight", f"model.{inner}.weight"
