"""Every place that depends on how transformers is made inside, not on its public interface.

Each function names the versions it was seen in: 4.57.6 and 5.23.0, the oldest and the newest that
danqing runs on. `tests/networks/test_insides.py` says which of them no longer fits.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from danqing.networks.messages import without_message

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def unsaved_buffer(name: str, shape: torch.Size) -> torch.Tensor:
    """Return a buffer that no file keeps, which building on the meta device left empty.

    CLIP counts its positions in `position_ids` (transformers 4.57.6 and 5.23.0).

    Raises:
        RuntimeError: it is another buffer.
    """
    if name != "position_ids":
        msg = f"no rule for the buffer {name}: compute it in make of the network's kind"
        raise RuntimeError(msg)
    return torch.arange(shape[-1]).expand(shape)


def make_encoder(network: Any, config: Any, values: Mapping[str, Any]) -> Any:
    """Make a text encoder whose attention does not depend on its config or the environment.

    Relies on `_attn_implementation` and `_supports_sdpa` (transformers 4.57.6 and 5.23.0).

    Args:
        network: class of the network.
        config: class of its config.
        values: of the config.
    """
    made = config.from_dict(dict(values))
    sdpa = getattr(network, "_supports_sdpa", False)
    made._attn_implementation = "sdpa" if sdpa else "eager"  # noqa: SLF001
    return network(made)


def fill_rotary_tables(network: Any) -> None:
    """Make the tables of rotary positions off the meta device: no file holds them.

    Relies on classes that hold `inv_freq` and are made from the config, or, as the vision tower's
    of 4.57.6, from half a head's width (transformers 4.57.6 and 5.23.0).
    """
    made: dict[type, Any] = {}
    for name, module in list(network.named_modules()):
        kind = type(module)
        if "inv_freq" not in dict(module.named_buffers(recurse=False)):
            continue
        if kind not in made:
            takes_config = "config" in inspect.signature(kind).parameters
            head = network.config.hidden_size // getattr(network.config, "num_heads", 1)
            with torch.device("cpu"):
                made[kind] = kind(network.config) if takes_config else kind(head // 2)
        holder, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(holder), leaf, made[kind])


def run_vision_tower(tower: Any, patches: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Return the merged tokens of Qwen2.5-VL's vision tower.

    transformers 5.23.0 computes positions from the grid, on the device that it is on, unless they
    are passed; 4.57.6 takes rows of a table. 5.23.0 returns an object, 4.57.6 a tensor.

    Args:
        tower: `model.visual`.
        patches: (patches, width), on its device.
        grid: (images, 3) on the CPU.
    """
    try:
        from transformers.vision_utils import get_vision_position_ids
    except ImportError:
        positions = {}
    else:
        ids = get_vision_position_ids(grid, tower.spatial_merge_size)
        positions = {"position_ids": ids.to(patches.device)}
    out = tower(patches, grid_thw=grid, **positions)
    features: torch.Tensor = out if isinstance(out, torch.Tensor) else out.pooler_output
    return features


def keep_layers(text: Any, count: int) -> None:
    """Drop the last layers and the final norm of a language model.

    Relies on its `layers` and `norm` (Qwen2.5-VL; transformers 4.57.6 and 5.23.0).
    """
    text.layers = text.layers[:count]
    text.norm = torch.nn.Identity()


def output_of(out: Any) -> torch.Tensor:
    """Return the states that a decoder layer gave: a tensor, or in 4.57.6 the first of a tuple."""
    states: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
    return states


def run_without_attention(layer: Any, states: torch.Tensor) -> torch.Tensor:
    """Run a decoder layer as if its attention gave zero.

    Repeats the second half of `Qwen2_5_VLDecoderLayer.forward`, by `post_attention_layernorm` and
    `mlp` (transformers 4.57.6 and 5.23.0).
    """
    out: torch.Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return out


def load_tokenizer(kind: Any, folder: Path) -> Any:
    """Load a tokenizer without the log line of what transformers 5.23.0 tries next.

    The error that follows says it better. 4.57.6 does not log it.
    """
    logger = "transformers.tokenization_utils_tokenizers"
    with without_message(logger, "Could not extract SentencePiece model"):
        return kind.from_pretrained(folder, local_files_only=True)


def sentencepiece_proto() -> Any:
    """Return an empty message of a SentencePiece model.

    Its class is the one that transformers brings (4.57.6 and 5.23.0).
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    return import_protobuf().ModelProto()
