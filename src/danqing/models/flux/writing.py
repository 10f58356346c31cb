"""The layouts of FLUX.1's own in which danqing writes it, from whatever layout it was read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from danqing.models.folder import config_table, schedule_table, tokenizer_folders
from danqing.models.kinds.flux_transformer import transformer_rows
from danqing.models.kinds.kl import shortcuts, vae_rows
from danqing.models.targets import Source, TargetFile, TargetLayout
from danqing.weights import EMBEDDED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from danqing.models.flux.model import FluxModel
    from danqing.networks.loading import Row
    from danqing.weights.writer import Planned

_COMFY = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
    "transformer": "model.diffusion_model.",
    "vae": "vae.",
}


def _bfl(model: FluxModel, dtype: str) -> TargetLayout:
    """The files of the BFL release, with the encoders in folders of transformers."""
    files, tables = [], {}
    for name, path in (("transformer", f"flux1-{model.spec.kind}"), ("vae", "ae")):
        source = Source(model, name, dtype)
        tensors = source.all_planned(_bfl_rows(model, name, source))
        metadata = _embedded(model, name)
        files.append(TargetFile(path=f"{path}.safetensors", tensors=tensors, metadata=metadata))
    copies = {}
    for name, folder in (("text_encoder", "clip"), ("text_encoder_2", "t5")):
        source = Source(model, name, dtype)
        tensors = source.all_planned(model.kind(name).published(source.shapes))
        files.append(TargetFile(path=f"{folder}/model.safetensors", tensors=tensors, sharded=True))
        tables[f"{folder}/config.json"] = config_table(model, name)
        tokenizer = name.replace("text_encoder", "tokenizer")
        copies[folder] = model.checkpoint.component(tokenizer).folder
    tables["scheduler/scheduler_config.json"] = schedule_table(model)
    return TargetLayout(files=files, configs=tables, copies=copies)


def _comfy(model: FluxModel, dtype: str) -> TargetLayout:
    """One file with everything, as ComfyUI's checkpoint loader takes it; tokenizers beside it."""
    tensors: list[Planned] = []
    metadata: dict[str, str] = {}
    for name, prefix in _COMFY.items():
        source = Source(model, name, dtype)
        is_bfl = name in ("transformer", "vae")
        own = model.kind(name).published(source.shapes)
        tensors += source.all_planned(_bfl_rows(model, name, source) if is_bfl else own, prefix)
        metadata |= _embedded(model, name)
    file = TargetFile(
        path=f"flux1-{model.spec.kind}.safetensors", tensors=tensors, metadata=metadata
    )
    tables = {"scheduler/scheduler_config.json": schedule_table(model)}
    return TargetLayout(files=[file], configs=tables, copies=tokenizer_folders(model))


LAYOUTS: Mapping[str, Callable[[FluxModel, str], TargetLayout]] = {
    "bfl": _bfl,
    "comfy": _comfy,
}


def _bfl_rows(model: FluxModel, name: str, source: Source) -> Iterable[Row]:
    """Rows under the names of the BFL release."""
    config = model.config_of(name)
    if name == "transformer":
        return transformer_rows(
            double=config["num_layers"],
            single=config["num_single_layers"],
            guided=bool(config.get("guidance_embeds")),
        )
    levels = len(config["block_out_channels"])
    return vae_rows(
        levels=levels,
        blocks=config["layers_per_block"],
        shortcuts=shortcuts(source.shapes, levels=levels),
    )


def _embedded(model: FluxModel, name: str) -> dict[str, str]:
    """Keep a config in the file's metadata: these layouts have no other place for it."""
    return {f"{EMBEDDED}.{name}": json.dumps(dict(model.config_of(name)))}
