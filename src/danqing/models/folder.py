"""The diffusers folder, written for any family: a folder a slot, as its kind is published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danqing import models
from danqing.models import tokenizers
from danqing.models.targets import Source, TargetFile, TargetLayout

if TYPE_CHECKING:
    from danqing.models.model import Model

VERSION = "0.38.0"
"""diffusers' version whose classes the configs are of."""
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def write_folder(model: Model, dtype: str, *, version: str = VERSION) -> TargetLayout:
    """Return the folder that diffusers' pipeline of this family opens.

    Args:
        model: checked.
        dtype: of the tensors; one of `targets.CHOICES`.
        version: of diffusers, as the index and the configs state it.
    """
    files, tables = [], {}
    rows: dict[str, list[str]] = {}
    for name in model.networks:
        kind = model.kind(name)
        source = Source(model, name, dtype)
        tensors = source.all_planned(kind.published(source.shapes))
        path = f"{name}/{_STEMS[kind.library]}.safetensors"
        files.append(TargetFile(path=path, tensors=tensors, sharded=True))
        tables[f"{name}/config.json"] = config_table(model, name, version)
        if kind.class_name:
            rows[name] = [kind.library, kind.class_name]
    for name in model.role("schedule"):
        rows[name] = ["diffusers", SCHEDULER]
        tables[f"{name}/scheduler_config.json"] = schedule_table(model, version)
    for slot in model.slots:
        if slot.kind in tokenizers.KINDS:
            rows[slot.name] = ["transformers", tokenizers.KINDS[slot.kind].class_name]
    tables["model_index.json"] = {
        "_class_name": models.pipeline_of(model.spec),
        "_diffusers_version": version,
        **dict(sorted(rows.items())),
    }
    return TargetLayout(files=files, configs=tables, copies=tokenizer_folders(model))


def config_table(model: Model, name: str, version: str = VERSION) -> dict[str, Any]:
    """Return a network's config as its library saves it."""
    kind, given = model.kind(name), model.config(name)
    config = {**given.labels, **given.values}
    if not kind.class_name:
        return config
    if kind.library == "diffusers":
        return {**config, "_class_name": kind.class_name, "_diffusers_version": version}
    return {**config, "architectures": [kind.class_name]}


def schedule_table(model: Model, version: str = VERSION) -> dict[str, Any]:
    """Return the config of the noise schedule."""
    return {
        "_class_name": SCHEDULER, "_diffusers_version": version, **model.schedule_config,
    }  # fmt: skip


def tokenizer_folders(model: Model) -> dict[str, Any]:
    """Return where the tokenizers lie, by name."""
    return {
        slot.name: model.checkpoint.component(slot.name).folder
        for slot in model.slots
        if slot.kind in tokenizers.KINDS
    }
