"""The layouts in which danqing writes a FLUX.1, from whatever layout it was read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from danqing.models.convert import Source, TargetFile, TargetLayout
from danqing.models.kinds.flux_transformer import transformer_rows
from danqing.models.kinds.kl import shortcuts, vae_rows
from danqing.networks.loading import Row, identity_rows
from danqing.weights import EMBEDDED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from danqing.models.flux.model import FluxModel
    from danqing.weights.writer import Planned

_NETWORKS = {
    "text_encoder": ("transformers", "CLIPTextModel", "model"),
    "text_encoder_2": ("transformers", "T5EncoderModel", "model"),
    "transformer": ("diffusers", "FluxTransformer2DModel", "diffusion_pytorch_model"),
    "vae": ("diffusers", "AutoencoderKL", "diffusion_pytorch_model"),
}
_SMALL = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
}
_COMFY = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
    "transformer": "model.diffusion_model.",
    "vae": "vae.",
}
_VERSION = "0.38.0"
"""Of the classes whose configs are written."""


def _diffusers(model: FluxModel, dtype: str) -> TargetLayout:
    """A folder that diffusers' FluxPipeline opens."""
    files, tables = [], {}
    for name, (_, class_name, stem) in _NETWORKS.items():
        source = Source(model, name, dtype)
        tensors = _planned(source, _own_rows(name, source))
        files.append(TargetFile(path=f"{name}/{stem}.safetensors", tensors=tensors, sharded=True))
        tables[f"{name}/config.json"] = _config(model, name, class_name)
    index = {"_class_name": "FluxPipeline", "_diffusers_version": _VERSION}
    parts = {name: [library, kind] for name, (library, kind, _) in _NETWORKS.items()}
    parts |= {name: [library, kind] for name, (library, kind) in _SMALL.items()}
    tables["model_index.json"] = {**index, **dict(sorted(parts.items()))}
    tables["scheduler/scheduler_config.json"] = _schedule(model)
    return TargetLayout(files=files, configs=tables, copies=_tokenizers(model))


def _bfl(model: FluxModel, dtype: str) -> TargetLayout:
    """The files of the BFL release, with the encoders in folders of transformers."""
    files, tables = [], {}
    for name, path in (("transformer", f"flux1-{model.spec.kind}"), ("vae", "ae")):
        source = Source(model, name, dtype)
        tensors = _planned(source, _bfl_rows(model, name, source))
        metadata = _embedded(model, name)
        files.append(TargetFile(path=f"{path}.safetensors", tensors=tensors, metadata=metadata))
    copies = {}
    for name, folder in (("text_encoder", "clip"), ("text_encoder_2", "t5")):
        source = Source(model, name, dtype)
        tensors = _planned(source, _own_rows(name, source))
        files.append(TargetFile(path=f"{folder}/model.safetensors", tensors=tensors, sharded=True))
        tables[f"{folder}/config.json"] = _config(model, name, _NETWORKS[name][1])
        tokenizer = name.replace("text_encoder", "tokenizer")
        copies[folder] = model.checkpoint.component(tokenizer).folder
    tables["scheduler/scheduler_config.json"] = _schedule(model)
    return TargetLayout(files=files, configs=tables, copies=copies)


def _comfy(model: FluxModel, dtype: str) -> TargetLayout:
    """One file with everything, as ComfyUI's checkpoint loader takes it; tokenizers beside it."""
    tensors: list[Planned] = []
    metadata: dict[str, str] = {}
    for name, prefix in _COMFY.items():
        source = Source(model, name, dtype)
        is_bfl = name in ("transformer", "vae")
        found = _bfl_rows(model, name, source) if is_bfl else _own_rows(name, source)
        tensors += _planned(source, found, prefix)
        metadata |= _embedded(model, name)
    file = TargetFile(
        path=f"flux1-{model.spec.kind}.safetensors", tensors=tensors, metadata=metadata
    )
    tables = {"scheduler/scheduler_config.json": _schedule(model)}
    return TargetLayout(files=[file], configs=tables, copies=_tokenizers(model))


LAYOUTS: Mapping[str, Callable[[FluxModel, str], TargetLayout]] = {
    "diffusers": _diffusers,
    "bfl": _bfl,
    "comfy": _comfy,
}


def _planned(source: Source, rows: Iterable[Row], prefix: str = "") -> list[Planned]:
    return [one for row in rows for one in source.planned(f"{prefix}{row.source}", row)]


def _own_rows(name: str, source: Source) -> list[Row]:
    """Rows under the names in which the networks are published.

    CLIP's have a prefix that transformers 5 left out of its module, and T5's tied embedding is kept
    once.
    """
    if name == "text_encoder":
        return [
            Row(f"text_model.{target.removeprefix('text_model.')}", (target,))
            for target in source.shapes
            if "position_ids" not in target
        ]
    if name == "text_encoder_2":
        return identity_rows(n for n in source.shapes if n != "encoder.embed_tokens.weight")
    return identity_rows(source.shapes)


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


def _config(model: FluxModel, name: str, class_name: str) -> dict[str, Any]:
    given = model.config(name)
    config = {**given.labels, **given.values}
    if _NETWORKS[name][0] == "diffusers":
        return {**config, "_class_name": class_name, "_diffusers_version": _VERSION}
    return {**config, "architectures": [class_name]}


def _embedded(model: FluxModel, name: str) -> dict[str, str]:
    """Keep a config in the file's metadata: these layouts have no other place for it."""
    return {f"{EMBEDDED}.{name}": json.dumps(dict(model.config_of(name)))}


def _schedule(model: FluxModel) -> dict[str, Any]:
    return {
        "_class_name": _SMALL["scheduler"][1],
        "_diffusers_version": _VERSION,
        **model.schedule_config,
    }


def _tokenizers(model: FluxModel) -> dict[str, Any]:
    return {name: model.checkpoint.component(name).folder for name in ("tokenizer", "tokenizer_2")}
