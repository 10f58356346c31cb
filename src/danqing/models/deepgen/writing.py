"""The layout in which danqing writes a DeepGen: the folder that was released.

From a `.pt` with base parts, the adapters are merged on the way.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from danqing.models.convert import Source, TargetFile, TargetLayout
from danqing.models.deepgen import prompts
from danqing.models.deepgen.configs import MERGED
from danqing.networks.loading import Row, identity_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from danqing.models.deepgen.model import DeepGenModel

_STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "connector": "model",
    "vlm": "model",
}
_CLASSES = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
_VERSION = "0.35.2"
"""Of the release's own index."""


def _diffusers(model: DeepGenModel, dtype: str) -> TargetLayout:
    """The released folder; the language model's names are those every transformers reads."""
    files, tables = [], {}
    for name, stem in _STEMS.items():
        source = Source(model, name, dtype)
        rows = _rows(name, source.shapes)
        tensors = [one for row in rows for one in source.planned(row.source, row)]
        files.append(TargetFile(path=f"{name}/{stem}.safetensors", tensors=tensors, sharded=True))
        tables[f"{name}/config.json"] = _config(model, name)
    tables["scheduler/scheduler_config.json"] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": _VERSION,
        **model.schedule_config,
    }
    tables["prompt_template.json"] = _template(model)
    tables["model_index.json"] = {
        "_class_name": ["deepgen_pipeline", "DeepGenPipeline"],
        "_diffusers_version": _VERSION,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        **{name: ["diffusers", kind] for name, kind in _CLASSES.items()},
    }
    copies = {"tokenizer": model.checkpoint.component("tokenizer").folder}
    return TargetLayout(files=files, configs=tables, copies=copies)


LAYOUTS: Mapping[str, Callable[[DeepGenModel, str], TargetLayout]] = {"diffusers": _diffusers}


def _rows(name: str, shapes: Iterable[str]) -> list[Row]:
    """Rows under the names in which the networks were released."""
    if name == "connector":
        return [Row(f"connector.{n}" if n.startswith("layers.") else n, (n,)) for n in shapes]
    if name == "vlm":
        return [Row(n.replace("language_model.", "model.", 1), (n,)) for n in shapes]
    return identity_rows(shapes)


def _config(model: DeepGenModel, name: str) -> dict[str, Any]:
    given = model.config(name)
    config = {**given.labels, **given.values}
    if name in _CLASSES:
        return {**config, "_class_name": _CLASSES[name], "_diffusers_version": _VERSION}
    if name == "vlm" and model.checkpoint.component(name).adapters:
        config[MERGED] = f"{len(model.checkpoint.component(name).adapters)} adapters"
    return config


def _template(model: DeepGenModel) -> dict[str, str]:
    return {key: asdict(model.template)[name] for key, name in prompts.KEYS.items()}
