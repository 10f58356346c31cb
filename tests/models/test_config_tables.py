"""What a config may say: allowed keys and values, and layers compared with the tensors there are."""

from __future__ import annotations

import inspect
import json
import shutil
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from danqing import models
from danqing.errors import CheckpointError, TensorMismatchError, UnknownModelError
from danqing.models.preflight import preflight

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FLUX_PARTS = ("text_encoder", "text_encoder_2", "transformer", "vae", "scheduler")
DEEPGEN_PARTS = ("vlm", "connector", "transformer", "vae", "scheduler")
CODE = (
    ("_attn_implementation", "evil/repo"), ("attn_implementation", "evil/repo"),
    ("_attn_implementation", "flash_attention_2"), ("auto_map", {"AutoModel": "evil.Model"}),
    ("trust_remote_code", True), ("custom_pipelines", "evil/pipeline"), ("use_kernels", True),
)  # fmt: skip
ABSURD: tuple[Any, ...] = (
    10_000, 10**9, 10**30, -1, 0, 1.5, "2", True, [2], [[2]] * 3, {"a": 2},
)  # fmt: skip


@pytest.fixture(scope="module")
def flux(schnell: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(schnell, tmp_path_factory.mktemp("configs") / "flux")


@pytest.fixture(scope="module")
def qwen(deepgen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(deepgen, tmp_path_factory.mktemp("configs") / "deepgen")


def config_file(folder: Path, part: str) -> Path:
    return folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")


@contextmanager
def changed(path: Path, *changes: tuple[str, object]) -> Iterator[None]:
    """Set keys of a config (`a.b` is `b` in the table `a`), and put the file back."""
    kept = path.read_text()
    table = json.loads(kept)
    for key, value in changes:
        *outer, last = key.split(".")
        inner = table
        for name in outer:
            inner = inner[name]
        inner[last] = value
    path.write_text(json.dumps(table))
    try:
        yield
    finally:
        path.write_text(kept)


class TooSlow(BaseException):
    """No `Exception`, which code under test may handle."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def faults(folder: Path) -> dict[str, Any]:
    """Return what is wrong, by component; a checkpoint that does not open has one fault."""
    try:
        found = preflight(models.open_checkpoint(folder))
    except CheckpointError as error:
        return {"": error}
    wrong = {part.name: part.fault for part in found.findings if part.fault}
    return wrong | ({"": found.fault} if found.fault else {})


def fault_of(folder: Path, part: str) -> CheckpointError | None:
    """Return what is wrong with one component, or with the folder."""
    try:
        checkpoint = models.open_checkpoint(folder)
        model = models.make_model(checkpoint, models.identify(checkpoint))
        if part in model.parts:
            model.check_part(part)
    except CheckpointError as error:
        return error
    return None


def notes(folder: Path) -> str:
    found = preflight(models.open_checkpoint(folder))
    assert found.sound, faults(folder)
    return "\n".join(note for part in found.findings for note in part.notes)


# --- keys that choose code -----------------------------------------------------------------------


@pytest.mark.finding(5)
@pytest.mark.parametrize("part", FLUX_PARTS)
def test_a_key_that_chooses_code_reaches_no_library(flux: Path, part: str) -> None:
    for key, value in CODE:
        with changed(config_file(flux, part), (key, value)):
            assert f"{key}: danqing chooses" in notes(flux)


@pytest.mark.finding(5)
@pytest.mark.parametrize(
    ("part", "table"),
    [*((part, "") for part in DEEPGEN_PARTS), ("vlm", "text_config."), ("vlm", "vision_config.")],
)
def test_nor_in_deepgen_at_any_depth(qwen: Path, part: str, table: str) -> None:
    for key, value in CODE[:4]:
        with changed(config_file(qwen, part), (f"{table}{key}", value)):
            assert f"{table}{key}: danqing chooses" in notes(qwen)


@pytest.mark.finding(5)
def test_the_attention_is_danqings_whatever_a_config_says(flux: Path, qwen: Path) -> None:
    keys = (("_attn_implementation", "eager"), ("attn_implementation", "eager"))
    inner = tuple(
        (f"{table}.{key}", value)
        for table in ("text_config", "vision_config")
        for key, value in keys
    )
    for folder, part, changes in (
        (flux, "text_encoder", keys), (flux, "text_encoder_2", keys), (qwen, "vlm", keys + inner),
    ):  # fmt: skip
        with changed(config_file(folder, part), *changes):
            checkpoint = models.open_checkpoint(folder)
            model = models.make_model(checkpoint, models.identify(checkpoint))
            module, _ = model.matched(part)
        networks: tuple[Any, ...] = (module, getattr(module, "language_model", module))
        for network in networks:
            wanted = "sdpa" if type(network)._supports_sdpa else "eager"
            assert network.config._attn_implementation == wanted


@pytest.mark.finding(5)
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "transformer", "vae"])
def test_foreign_quantization_is_refused_by_name(flux: Path, part: str) -> None:
    asked = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with changed(config_file(flux, part), ("quantization_config", asked)):
        wrong = fault_of(flux, part)
        assert isinstance(wrong, UnknownModelError)
        assert "bitsandbytes" in str(wrong)
    with changed(
        config_file(flux, part), ("quantization_config", {"quant_method": "compressed-tensors"})
    ):
        assert "quantization_config" in notes(flux)


@pytest.mark.finding(5)
def test_an_unknown_key_is_ignored_with_a_note(flux: Path) -> None:
    with changed(config_file(flux, "vae"), ("some_new_thing", 3)):
        assert notes(flux) == (
            "the config of vae: ignored some_new_thing: unknown, and no part of this architecture"
        )


@pytest.mark.finding(5)
@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vae", "latents_mean", [0.1] * 16), ("text_encoder_2", "is_decoder", True),
        ("text_encoder", "pruned_heads", {"0": [1]}),
        ("scheduler", "_class_name", "DPMSolverMultistepScheduler"),
    ],
)  # fmt: skip
def test_a_key_that_would_change_the_computation_is_refused(
    flux: Path, part: str, key: str, value: object
) -> None:
    with changed(config_file(flux, part), (key, value)):
        wrong = fault_of(flux, part)
        assert isinstance(wrong, UnknownModelError)
        assert key in wrong.what


# --- numbers -------------------------------------------------------------------------------------

NUMBERS = (
    ("text_encoder", ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size",
                      "max_position_embeddings", "intermediate_size")),
    ("text_encoder_2", ("num_layers", "num_heads", "d_model", "d_kv", "d_ff", "vocab_size",
                        "relative_attention_num_buckets")),
    ("transformer", ("num_layers", "num_single_layers", "attention_head_dim", "in_channels",
                     "num_attention_heads", "joint_attention_dim", "axes_dims_rope")),
    ("vae", ("layers_per_block", "block_out_channels", "latent_channels", "norm_num_groups",
             "down_block_types", "up_block_types")),
)  # fmt: skip
DEEPGEN_NUMBERS = (
    ("vlm", ("text_config.num_hidden_layers", "vision_config.depth", "text_config.hidden_size",
             "text_config.num_attention_heads", "text_config.vocab_size",
             "vision_config.patch_size", "vision_config.num_heads", "vision_config.window_size",
             "text_config.rope_scaling.mrope_section")),
    ("transformer", ("num_layers", "pos_embed_max_size", "sample_size", "num_attention_heads",
                     "caption_projection_dim", "dual_attention_layers")),
    ("vae", ("layers_per_block", "block_out_channels", "latent_channels")),
    ("connector", ("num_attention_heads", "num_hidden_layers", "hidden_size")),
)  # fmt: skip


def check_numbers(folder: Path, part: str, keys: tuple[str, ...], values: tuple[Any, ...]) -> None:
    for key in keys:
        for value in values:
            with changed(config_file(folder, part), (key, value)), limited(10):
                started = time.process_time()
                assert fault_of(folder, part), (key, value)
                assert time.process_time() - started < 2, (key, value)


@pytest.mark.finding(6)
@pytest.mark.parametrize(("part", "keys"), NUMBERS)
def test_numbers_are_not_believed(flux: Path, part: str, keys: tuple[str, ...]) -> None:
    check_numbers(flux, part, keys, ABSURD)


@pytest.mark.finding(6)
@pytest.mark.parametrize(("part", "keys"), DEEPGEN_NUMBERS)
def test_numbers_are_not_believed_in_deepgen(qwen: Path, part: str, keys: tuple[str, ...]) -> None:
    check_numbers(qwen, part, keys, (10**9, -1, 1.5, True, "2", [[2]] * 3))


@pytest.mark.finding(6)
def test_layers_are_counted_before_a_network_is_built(
    flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("danqing.models.outline.on_meta", build)
    path = config_file(flux, "transformer")
    with changed(path, ("num_layers", 100)):
        wrong = fault_of(flux, "transformer")
    assert isinstance(wrong, TensorMismatchError)
    assert "num_layers is 100, of the tensors 2" in str(wrong)


@pytest.mark.finding(6)
@pytest.mark.parametrize("text", ["1" + "0" * 400, "9" * 5000, "NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(flux: Path, text: str) -> None:
    for part, key in (("transformer", "num_layers"), ("scheduler", "shift"), ("vae", "act_fn")):
        path = config_file(flux, part)
        kept = path.read_text()
        with changed(path, (key, "<here>")), limited(10):
            path.write_text(path.read_text().replace('"<here>"', text))
            assert fault_of(flux, part), part
        assert path.read_text() == kept


SCHEDULES: tuple[tuple[str, Any], ...] = (
    ("num_train_timesteps", 10**9), ("num_train_timesteps", 10**12), ("num_train_timesteps", 0),
    ("num_train_timesteps", -5), ("num_train_timesteps", 1.5), ("num_train_timesteps", True),
    ("shift", 0), ("shift", -1), ("shift", 10**38), ("shift", "3"), ("shift", []),
    ("base_shift", 1e300), ("max_shift", "a"), ("max_image_seq_len", 0), ("max_image_seq_len", -1),
    ("max_image_seq_len", 2**63), ("base_image_seq_len", None), ("use_dynamic_shifting", "yes"),
    ("use_karras_sigmas", 1), ("shift_terminal", 0), ("time_shift_type", "evil"),
    ("invert_sigmas", "no"), ("stochastic_sampling", [True]),
)  # fmt: skip


@pytest.mark.finding(6)
def test_schedules_are_bounded(flux: Path, qwen: Path) -> None:
    for folder in (flux, qwen):
        for key, value in SCHEDULES:
            with changed(config_file(folder, "scheduler"), (key, value)), limited(10):
                wrong = fault_of(folder, "scheduler")
                assert wrong, (key, value)
                assert key in wrong.what
                assert wrong.seen
                assert wrong.allowed
        both = (
            ("use_dynamic_shifting", True),
            ("base_image_seq_len", 64),
            ("max_image_seq_len", 64),
        )
        with changed(config_file(folder, "scheduler"), *both):
            fault_of(folder, "scheduler")  # the library divides by zero, or has no use for them


# --- configs as released -------------------------------------------------------------------------

RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1-dev transformer": ("FLUX_TRANSFORMER", {
        "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0",
        "_name_or_path": "../checkpoints/flux-dev/transformer", "attention_head_dim": 128,
        "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096,
        "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1,
        "pooled_projection_dim": 768,
    }),
    "FLUX.1-dev vae": ("AUTOENCODER", {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0.dev0",
        "_name_or_path": "../checkpoints/flux-dev", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True, "in_channels": 3, "latent_channels": 16, "latents_mean": None,
        "latents_std": None, "layers_per_block": 2, "mid_block_add_attention": True,
        "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 0.3611,
        "shift_factor": 0.1159, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False, "use_quant_conv": False,
    }),
    "FLUX.1 text_encoder": ("CLIP_TEXT", {
        "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
        "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.3", "vocab_size": 49408,
    }),
    "FLUX.1 text_encoder_2": ("T5_ENCODER", {
        "_name_or_path": "google/t5-v1_1-xxl", "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096,
        "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1,
        "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
        "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-06,
        "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24,
        "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.3", "use_cache": True,
        "vocab_size": 32128,
    }),
    "FLUX.1-dev scheduler": ("SCHEDULE", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0",
        "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
        "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
    }),
    "SD3.5-medium transformer": ("SD3_TRANSFORMER", {
        "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.31.0.dev0",
        "attention_head_dim": 64, "caption_projection_dim": 1536,
        "dual_attention_layers": list(range(13)), "in_channels": 16, "joint_attention_dim": 4096,
        "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "sample_size": 128,
    }),
    "Qwen2.5-VL-3B-Instruct": ("QWEN_VL", {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
        "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 128000,
        "max_window_layers": 70, "model_type": "qwen2_5_vl", "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
            "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936,
    }),
}  # fmt: skip
"""Configs as they were published."""


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_read_without_a_note(name: str, tmp_path: Path) -> None:
    from danqing.models import config_tables

    kind, config = RELEASED[name]
    found = config_tables.read_config(
        getattr(config_tables, kind), config, name=name, place=tmp_path
    )
    assert found.notes == ()
    assert found.labels.keys() <= set(config_tables.LABELS)
    dropped = config.keys() - found.values.keys() - set(config_tables.LABELS)
    kinds = getattr(config_tables, kind)
    assert dropped <= {*kinds.fixed, *kinds.unused}


def test_every_setting_of_the_libraries_is_in_a_table() -> None:
    """A setting that a newer library adds is looked at before it is ignored."""
    import diffusers

    from danqing.models import config_tables

    for name, kind in (
        ("FluxTransformer2DModel", config_tables.FLUX_TRANSFORMER),
        ("SD3Transformer2DModel", config_tables.SD3_TRANSFORMER),
        ("AutoencoderKL", config_tables.AUTOENCODER),
        ("FlowMatchEulerDiscreteScheduler", config_tables.SCHEDULE),
    ):
        takes = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
        assert takes <= {*kind.fields, *kind.fixed}, name


def test_configs_that_the_libraries_save_have_no_unknown_keys(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, Qwen2_5_VLConfig, T5Config

    from danqing.models import config_tables
    from tests.deepgen_toys import vlm_config

    for config, kind in (
        (CLIPTextConfig(), config_tables.CLIP_TEXT),
        (T5Config(feed_forward_proj="gated-gelu"), config_tables.T5_ENCODER),
        (Qwen2_5_VLConfig.from_dict(vlm_config()), config_tables.QWEN_VL),
    ):
        table = json.loads(json.dumps(config.to_dict()))
        found = config_tables.read_config(kind, table, name="config", place=tmp_path)
        assert found.notes == (), found.notes
