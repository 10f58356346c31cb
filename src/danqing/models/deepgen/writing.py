"""The layout in which danqing writes a DeepGen: the folder that was released.

From a `.pt` with base parts, the adapters are merged on the way.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from danqing.models.deepgen import prompts
from danqing.models.deepgen.configs import MERGED
from danqing.models.folder import write_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from danqing.models.deepgen.model import DeepGenModel
    from danqing.models.targets import TargetLayout

_VERSION = "0.35.2"
"""Of the release's own index."""


def _diffusers(model: DeepGenModel, dtype: str) -> TargetLayout:
    """The released folder; its index leaves out what the pipeline loads on its own."""
    layout = write_folder(model, dtype, version=_VERSION)
    tables = {name: dict(table) for name, table in layout.configs.items()}
    index = tables["model_index.json"]
    index["_class_name"] = ["deepgen_pipeline", index["_class_name"]]
    for name in model.role("tokenizer"):
        del index[name]
    tables["prompt_template.json"] = {
        key: asdict(model.template)[name] for key, name in prompts.KEYS.items()
    }
    if adapters := model.checkpoint.component("vlm").adapters:
        tables["vlm/config.json"][MERGED] = f"{len(adapters)} adapters"
    layout.configs = tables
    return layout


LAYOUTS: Mapping[str, Callable[[DeepGenModel, str], TargetLayout]] = {"diffusers": _diffusers}
