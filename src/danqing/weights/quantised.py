"""Weights in fewer bits, as they are found in safetensors files: which are read, which refused.

A tensor in scaled fp8 is worth nothing without its scale, and looks sound without it: other tools
have painted plain white from such files. So companions are joined to their weights here, for every
layout, and a kind of quantisation that is not known is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from danqing.errors import CheckpointDamagedError, UnknownModelError
from danqing.weights.markers import MARKER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from danqing.weights.tensor_file import TensorEntry

BYTES = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
"""Kinds of one byte for a number, which a scale may go with."""
_SCALES = (".scale_weight", ".weight_scale")
"""Two spellings of the same thing: the weight is the stored value times this."""
_UNUSED = (".scale_input", ".input_scale", MARKER)
"""Of the activations, which danqing does not quantise; and markers, which `check_markers` read."""
_MARKER = "scaled_fp8"
_FOREIGN = {
    ".quant_map": "bitsandbytes (NF4 or int8)",
    ".absmax": "bitsandbytes (NF4 or int8)",
    ".qweight": "SVDQuant (nunchaku) or GPTQ, for CUDA alone",
    ".weight_scale_2": "NVFP4, for CUDA alone",
    ".weight_scale_inv": "fp8 scaled by blocks",
    ".wscales": "SVDQuant (nunchaku), for CUDA alone",
    "_weight_qdata": "torchao",
    ".weight_qdata": "torchao",
    ".weight._data": "quanto",
}
"""Endings of companions that only such files have."""


def refuse_foreign(entries: Mapping[str, TensorEntry]) -> None:
    """Refuse tensors that only files of other kinds of quantisation have.

    Raises:
        UnknownModelError: naming the kind.
    """
    for ending, kind in _FOREIGN.items():
        if odd := next((name for name in entries if name.endswith(ending)), None):
            raise UnknownModelError(
                f"the weights are quantised by {kind}, which danqing does not read",
                seen=f"{entries[odd].file}: {odd}",
                allowed="float32, float16, bfloat16, fp8 with or without a scale, int8 with one, "
                "GGUF",
            )


def join_scales(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the tensors with each scale joined to its weight, and companions left out.

    Raises:
        UnknownModelError: the file is quantised in a way that danqing does not read.
        CheckpointDamagedError: a scale does not fit its weight, or has none.
    """
    refuse_foreign(entries)
    companions = (*_SCALES, *_UNUSED)
    joined = {
        name: entry
        for name, entry in entries.items()
        if not name.endswith(companions) and name != _MARKER
    }
    for name, scale in entries.items():
        spelling = next((end for end in _SCALES if name.endswith(end)), None)
        if spelling is not None:
            layer = f"{name.removesuffix(spelling)}.weight"
            if layer not in joined:
                raise CheckpointDamagedError("a scale has no weight", seen=f"{scale.file}: {name}")
            joined[layer] = _scaled(joined[layer], scale)
    return joined


def _scaled(weight: TensorEntry, scale: TensorEntry) -> TensorEntry:
    rows = weight.shape[0] if weight.shape else 1
    fits = math.prod(scale.shape) == 1 or scale.shape in ((rows,), (rows, 1))
    if weight.dtype not in BYTES or not fits or scale.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointDamagedError(
            "a scale does not fit its weight",
            seen=f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}, "
            f"{weight.name} is {weight.dtype} {list(weight.shape)}",
            allowed="one number, or one for each row, beside a weight in fp8 or int8",
        )
    if weight.scale is not None:
        raise CheckpointDamagedError("a weight has two scales", seen=f"{scale.file}: {weight.name}")
    return replace(weight, scale=scale)
