"""Configs as data: which keys each kind of config may have, and which values each key may have.

A config comes with the weights, so it is not trusted. Only keys in these tables reach diffusers or
transformers, and only with values of the right type and size. Keys that choose code are dropped:
danqing chooses the class and the attention kernel itself. Keys that nobody reads are dropped, too,
with a note where they are unknown; a key that would change the computation is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from danqing.errors import CheckpointDamagedError, UnknownModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    Check = Callable[[Any], bool]

MAX_LAYERS = 128
"""Of each kind in a network; the largest network danqing runs has 57 blocks in two lists."""
MAX_WIDTH = 2**17
MAX_VOCABULARY = 2**21
MAX_TOKEN = 2**31
_SHOWN = 80
_MAX_NOTES = 8


@dataclass(frozen=True, slots=True)
class Field:
    """The values that one key may have.

    Attributes:
        accepts: whether a value is one of them.
        allowed: what they are, in words.
    """

    accepts: Check
    allowed: str


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of config.

    Attributes:
        fields: keys that reach the library.
        tables: keys whose value is a config of its own kind.
        fixed: keys that reach no library, and must have one of these values: any other would ask
            for a computation that danqing does not do.
        unused: keys that reach no library and change nothing.
    """

    fields: Mapping[str, Field]
    tables: Mapping[str, Kind] = field(default_factory=dict)
    fixed: Mapping[str, Sequence[object]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config that was checked.

    Attributes:
        values: what reaches the library.
        labels: names and versions that the saving library wrote, for a copy of the config.
        notes: which keys were ignored, and why.
    """

    values: dict[str, Any]
    labels: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_config(kind: Kind, config: Mapping[str, Any], *, name: str, place: Path) -> Config:
    """Check a config and return what may be used of it.

    Args:
        kind: which keys and values it may have.
        config: as it was read.
        name: of its component.
        place: of the component, for errors.

    Raises:
        CheckpointDamagedError: a value has the wrong type or is out of range.
        UnknownModelError: a key asks for something that danqing does not do.
    """
    reader = _Reader(name, place)
    values = reader.read(kind, config, "")
    labels = {
        key: config[key]
        for key in LABELS
        if isinstance(value := config.get(key), str) or _are_texts(value)
    }
    return Config(values=values, labels=labels, notes=tuple(reader.notes()))


LABELS = (
    "_class_name", "_diffusers_version", "_name_or_path", "architectures", "model_type",
    "torch_dtype", "dtype", "transformers_version", "danqing_merged",
)  # fmt: skip
"""What libraries write to keep order among their files; danqing goes by the tensors."""

CODE_KEYS = frozenset({
    "_attn_implementation", "attn_implementation", "_attn_implementation_internal",
    "_attn_implementation_autoset", "_experts_implementation", "experts_implementation",
    "_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention", "use_flash_attention_2",
    "attention_backend", "attn_backend", "attn_processor", "auto_map", "trust_remote_code",
    "custom_pipeline", "custom_pipelines", "_commit_hash", "_hub_kernels", "kernel_config",
    "use_kernels", "_auto_class", "tp_plan", "base_model_tp_plan", "base_model_pp_plan",
    "device_map",
})  # fmt: skip
"""Keys by which a config would choose code, a kernel or a place: never followed."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_READ_QUANTIZATION = "compressed-tensors"
"""Its scales lie beside the tensors, where weights/quantised.py finds them."""

_GENERATION_KEYS = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "label2id", "length_penalty", "max_length", "max_new_tokens",
    "min_length", "n_positions", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_past",
    "output_scores", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
    "cross_attention_hidden_size", "dropout", "processor_class", "generation_config",
})  # fmt: skip
"""Keys of every config of transformers, about text generation, training and return types."""
_TRANSFORMERS_FIXED: Mapping[str, Sequence[object]] = {
    "pruned_heads": ({}, None), "chunk_size_feed_forward": (0, None),
    "is_decoder": (False, None), "add_cross_attention": (False, None),
}  # fmt: skip


def _shown(value: object) -> str:
    """Return a value as JSON spells it, cut where it is long."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or type(value) is bool:
        return words[value]
    written = repr(value[:_SHOWN] if isinstance(value, (str, list)) else value)
    return written[:_SHOWN] + (" ..." if len(written) > _SHOWN else "")


def whole(least: int, most: int) -> Field:
    """Accept whole numbers between two."""
    return Field(
        lambda value: type(value) is int and least <= value <= most, f"{least} to {most}, whole"
    )


def real(least: float, most: float) -> Field:
    """Accept numbers between two."""
    return Field(
        lambda value: (
            type(value) in (int, float) and math.isfinite(value) and least <= value <= most
        ),
        f"{least:g} to {most:g}",
    )


def choice(*values: object) -> Field:
    """Accept one of a few values."""
    return Field(
        lambda value: any(value == one and type(value) is type(one) for one in values),
        ", ".join(_shown(one) for one in values),
    )


def optional(inner: Field) -> Field:
    """Accept null as well."""
    return Field(lambda value: value is None or inner.accepts(value), f"null, or {inner.allowed}")


def several(inner: Field, least: int, most: int) -> Field:
    """Accept a list whose items are all accepted."""
    return Field(
        lambda value: (
            isinstance(value, (list, tuple))
            and least <= len(value) <= most
            and all(inner.accepts(item) for item in value)
        ),
        f"a list of {least} to {most} items, each {inner.allowed}",
    )


def either(first: Field, second: Field) -> Field:
    """Accept what one of two fields accepts."""
    return Field(
        lambda value: first.accepts(value) or second.accepts(value),
        f"{first.allowed}; or {second.allowed}",
    )


def text(most: int) -> Field:
    """Accept a text of limited length."""
    return Field(
        lambda value: isinstance(value, str) and len(value) <= most,
        f"a text of at most {most} characters",
    )


FLAG = Field(lambda value: type(value) is bool, "true or false")
LAYERS = whole(1, MAX_LAYERS)
WIDTH = whole(1, MAX_WIDTH)
HEADS = whole(1, 1024)
VOCABULARY = whole(1, MAX_VOCABULARY)
EPSILON = real(1e-12, 0.1)
SHARE = real(0, 1)
TOKEN = optional(whole(-1, MAX_TOKEN))
TOKENS = either(TOKEN, several(whole(0, MAX_TOKEN), 0, 64))
_DEVIATION = real(0, 1000)
_ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish",
)  # fmt: skip
ACTIVATION = choice(*_ACTIVATIONS)

FLUX_TRANSFORMER = Kind(
    fields={
        "patch_size": choice(1), "in_channels": whole(1, 4096),
        "out_channels": optional(whole(1, 4096)), "num_layers": LAYERS,
        "num_single_layers": LAYERS, "attention_head_dim": whole(2, 1024),
        "num_attention_heads": HEADS, "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH, "guidance_embeds": FLAG,
        "axes_dims_rope": several(whole(2, 1024), 3, 3),
    },
)  # fmt: skip
SD3_TRANSFORMER = Kind(
    fields={
        "sample_size": whole(1, 4096), "patch_size": choice(2), "in_channels": whole(1, 4096),
        "out_channels": whole(1, 4096), "num_layers": LAYERS,
        "attention_head_dim": whole(2, 1024), "num_attention_heads": HEADS,
        "joint_attention_dim": WIDTH, "caption_projection_dim": WIDTH,
        "pooled_projection_dim": WIDTH, "pos_embed_max_size": whole(1, 1024),
        "dual_attention_layers": several(whole(0, MAX_LAYERS - 1), 0, MAX_LAYERS),
        "qk_norm": choice(None, "rms_norm"),
    },
)  # fmt: skip
AUTOENCODER = Kind(
    fields={
        "in_channels": choice(3), "out_channels": choice(3), "latent_channels": whole(1, 256),
        "block_out_channels": several(whole(1, 8192), 1, 8), "layers_per_block": whole(1, 16),
        "norm_num_groups": whole(1, 1024),
        "down_block_types": several(choice("DownEncoderBlock2D"), 1, 8),
        "up_block_types": several(choice("UpDecoderBlock2D"), 1, 8),
        "act_fn": choice("silu", "swish", "mish", "gelu", "relu"),
        "sample_size": either(whole(1, 16384), several(whole(1, 16384), 2, 2)),
        "scaling_factor": real(1e-6, 1e6), "shift_factor": optional(real(-1e6, 1e6)),
        "force_upcast": FLAG, "use_quant_conv": FLAG, "use_post_quant_conv": FLAG,
        "mid_block_add_attention": FLAG,
    },
    fixed={"latents_mean": (None,), "latents_std": (None,)},
)  # fmt: skip
CLIP_TEXT = Kind(
    fields={
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": WIDTH,
        "projection_dim": optional(WIDTH), "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": whole(2, 4096),
        "hidden_act": ACTIVATION, "layer_norm_eps": EPSILON, "attention_dropout": SHARE,
        "initializer_range": _DEVIATION, "initializer_factor": _DEVIATION,
        "bos_token_id": TOKEN, "eos_token_id": TOKENS, "pad_token_id": TOKEN,
    },
    fixed=_TRANSFORMERS_FIXED,
    unused=_GENERATION_KEYS | {"tie_word_embeddings", "is_encoder_decoder"},
)  # fmt: skip
T5_ENCODER = Kind(
    fields={
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": whole(1, 4096), "d_ff": WIDTH,
        "num_layers": LAYERS, "num_heads": HEADS,
        "relative_attention_num_buckets": whole(2, 4096),
        "relative_attention_max_distance": whole(2, 2**20), "dropout_rate": SHARE,
        "layer_norm_epsilon": EPSILON, "initializer_factor": _DEVIATION,
        "feed_forward_proj": choice(*_ACTIVATIONS, *(f"gated-{name}" for name in _ACTIVATIONS)),
        "dense_act_fn": ACTIVATION, "is_gated_act": FLAG, "is_encoder_decoder": FLAG,
        "use_cache": FLAG, "tie_word_embeddings": FLAG, "bos_token_id": TOKEN,
        "eos_token_id": TOKENS, "pad_token_id": TOKEN,
    },
    fixed=_TRANSFORMERS_FIXED,
    unused=_GENERATION_KEYS | {"num_decoder_layers", "classifier_dropout", "scale_decoder_outputs"},
)  # fmt: skip
_ROPE = Kind(
    fields={
        "type": choice("default", "mrope"), "rope_type": choice("default", "mrope"),
        "mrope_section": several(whole(1, 1024), 3, 3), "rope_theta": real(1, 1e12),
    },
)  # fmt: skip
_VISION_ROPE = Kind(
    fields={"rope_type": choice("default", "axial"), "rope_theta": real(1, 1e12)},
)
_QWEN_TEXT_FIELDS = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": WIDTH,
    "num_hidden_layers": whole(2, MAX_LAYERS), "num_attention_heads": HEADS,
    "num_key_value_heads": optional(HEADS), "hidden_act": ACTIVATION,
    "max_position_embeddings": whole(1, MAX_TOKEN), "initializer_range": _DEVIATION,
    "rms_norm_eps": EPSILON, "rope_theta": real(1, 1e12), "use_cache": FLAG,
    "attention_dropout": SHARE, "tie_word_embeddings": FLAG, "max_window_layers": whole(0, 10_000),
    "sliding_window": optional(whole(1, MAX_TOKEN)), "bos_token_id": TOKEN,
    "eos_token_id": TOKENS, "pad_token_id": TOKEN,
}  # fmt: skip
_TOKEN_NAMES = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_QWEN_TOKENS = dict.fromkeys(_TOKEN_NAMES, TOKEN)
_QWEN_TEXT = Kind(
    fields=_QWEN_TEXT_FIELDS,
    tables={"rope_scaling": _ROPE, "rope_parameters": _ROPE},
    fixed={**_TRANSFORMERS_FIXED, "use_sliding_window": (False, None)},
    unused=_GENERATION_KEYS
    | {*_QWEN_TOKENS, "vision_token_id", "is_encoder_decoder", "layer_types"},
)
_QWEN_VISION = Kind(
    fields={
        "depth": LAYERS, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": HEADS,
        "out_hidden_size": WIDTH, "in_channels": choice(3), "in_chans": choice(3),
        "patch_size": choice(14), "spatial_merge_size": choice(2),
        "temporal_patch_size": choice(2), "window_size": whole(28, 4096),
        "tokens_per_second": real(0, 1000), "hidden_act": ACTIVATION,
        "fullatt_block_indexes": several(whole(0, MAX_LAYERS - 1), 0, MAX_LAYERS),
        "initializer_range": _DEVIATION,
    },
    tables={"rope_parameters": _VISION_ROPE},
    fixed=_TRANSFORMERS_FIXED,
    unused=_GENERATION_KEYS
    | {
        "spatial_patch_size", "tie_word_embeddings", "is_encoder_decoder", "bos_token_id",
        "eos_token_id", "pad_token_id",
    },
)  # fmt: skip
QWEN_VL = Kind(
    fields={**_QWEN_TEXT_FIELDS, **_QWEN_TOKENS},
    tables={
        "text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION, "rope_scaling": _ROPE,
        "rope_parameters": _ROPE,
    },
    fixed={**_TRANSFORMERS_FIXED, "use_sliding_window": (False, None)},
    unused=_GENERATION_KEYS | {"vision_token_id", "is_encoder_decoder", "layer_types"},
)  # fmt: skip
_CONNECTOR_FIELDS = {
    "num_attention_heads": HEADS, "layer_norm_eps": EPSILON, "hidden_size": WIDTH,
    "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
    "hidden_act": choice("gelu_pytorch_tanh"), "num_queries": whole(1, 65536),
    "query_size": WIDTH, "input_size": WIDTH, "pooled_projection_dim": WIDTH,
    "joint_attention_dim": WIDTH,
}  # fmt: skip
_INNER_CONNECTOR = Kind(
    fields=_CONNECTOR_FIELDS,
    fixed=_TRANSFORMERS_FIXED,
    unused=_GENERATION_KEYS
    | {"attention_dropout", "tie_word_embeddings", "is_encoder_decoder"},
)  # fmt: skip
CONNECTOR = Kind(
    fields=_CONNECTOR_FIELDS,
    tables={"connector": _INNER_CONNECTOR},
    fixed=_INNER_CONNECTOR.fixed,
    unused=_INNER_CONNECTOR.unused,
)
SCHEDULE = Kind(
    fields={
        "num_train_timesteps": whole(1, 100_000), "shift": real(1e-3, 1000),
        "use_dynamic_shifting": FLAG, "base_shift": optional(real(-100, 100)),
        "max_shift": optional(real(-100, 100)), "base_image_seq_len": whole(1, 2**24),
        "max_image_seq_len": whole(1, 2**24), "invert_sigmas": FLAG,
        "shift_terminal": optional(real(1e-6, 1)), "use_karras_sigmas": optional(FLAG),
        "use_exponential_sigmas": optional(FLAG), "use_beta_sigmas": optional(FLAG),
        "time_shift_type": choice("exponential", "linear"), "stochastic_sampling": FLAG,
    },
    fixed={"_class_name": ("FlowMatchEulerDiscreteScheduler",)},
)  # fmt: skip


class _Reader:
    """Reads one config with the tables in it."""

    def __init__(self, name: str, place: Path) -> None:
        self._name = name
        self._place = place
        self._code: list[str] = []
        self._unknown: list[str] = []

    def read(self, kind: Kind, config: Mapping[str, Any], path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in config.items():
            where = f"{path}{key}"
            if key in kind.fields:
                self._check(kind.fields[key], where, value)
                values[key] = value
            elif key in kind.tables:
                inner = self._table(kind.tables[key], where, value)
                if inner is not None:
                    values[key] = inner
            elif key in kind.fixed:
                if not any(value == one and type(value) is type(one) for one in kind.fixed[key]):
                    raise self._refused(where, value, kind.fixed[key])
            elif key in QUANTIZATION_KEYS:
                self._check_quantization(where, value)
            elif key in CODE_KEYS:
                self._code.append(where)
            elif key not in kind.unused and key not in LABELS:
                self._unknown.append(where)
        return values

    def notes(self) -> list[str]:
        """Return a line for the keys that choose code, and one for unknown keys."""
        rows = (
            (self._code, "danqing chooses code and kernels itself"),
            (self._unknown, "unknown, and no part of this architecture"),
        )
        return [
            f"the config of {self._name}: ignored {_listed(keys)}: {reason}"
            for keys, reason in rows
            if keys
        ]

    def _check(self, one: Field, where: str, value: object) -> None:
        if not one.accepts(value):
            raise CheckpointDamagedError(
                f"{where} in the config of {self._name} is not usable",
                seen=f"{self._place}: {_shown(value)}",
                allowed=one.allowed,
            )

    def _table(self, kind: Kind, where: str, value: object) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CheckpointDamagedError(
                f"{where} in the config of {self._name} is not usable",
                seen=f"{self._place}: {_shown(value)}",
                allowed="a table",
            )
        return self.read(kind, value, f"{where}.")

    def _check_quantization(self, where: str, value: object) -> None:
        method = value.get("quant_method") if isinstance(value, dict) else value
        if value is None or value == {}:
            return
        if method != _READ_QUANTIZATION:
            raise UnknownModelError(
                f"the config of {self._name} says that its weights are quantised in a way that "
                "danqing does not read",
                seen=f"{self._place}: {where}: {_shown(method)}",
                allowed=f"no {where}, or {_READ_QUANTIZATION}; fp8 and int8 with scales beside the "
                "weights; GGUF",
                hint="get the model's release in bfloat16, float16, fp8 or GGUF",
            )
        self._code.append(where)

    def _refused(self, where: str, value: object, values: Sequence[object]) -> UnknownModelError:
        return UnknownModelError(
            f"{where} in the config of {self._name} asks for something danqing does not do",
            seen=f"{self._place}: {_shown(value)}",
            allowed=", ".join(_shown(one) for one in values),
        )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _listed(keys: list[str]) -> str:
    shown = ", ".join(key[:_SHOWN] for key in keys[:_MAX_NOTES])
    return shown + (f" and {len(keys) - _MAX_NOTES} more" if len(keys) > _MAX_NOTES else "")
