"""A toy DeepGen-1.0: the real architecture and file formats, small widths, random weights.

As a program it writes one, so that danqing can be tried before 13.5 GB are downloaded:

    python tests/deepgen_toys.py toy-deepgen

Its pictures are coloured noise. All widths differ, so that nothing fits where it does not belong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.toys import byte_symbols

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ID = {word: 256 + place for place, word in enumerate(SPECIAL)}
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 36, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 264, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 32768, "hidden_act": "silu", "tie_word_embeddings": True,
    "bos_token_id": 256, "eos_token_id": 258,
}  # fmt: skip
ROPE = {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "fullatt_block_indexes": [1], "in_channels": 3, "in_chans": 3, "hidden_act": "silu",
    "tokens_per_second": 2,
}  # fmt: skip
TOKENS = {
    "image_token_id": ID["<|image_pad|>"], "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"], "vision_end_token_id": ID["<|vision_end|>"],
}  # fmt: skip
CONNECTOR = {
    "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_queries": 8, "query_size": 32, "input_size": 192, "pooled_projection_dim": 24,
    "joint_attention_dim": 40, "layer_norm_eps": 1e-6,
}  # fmt: skip
TRANSFORMER = {
    "sample_size": 16, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3,
    "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 40,
    "caption_projection_dim": 64, "pooled_projection_dim": 24, "pos_embed_max_size": 24,
    "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16,
    "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 64, "scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
SCHEDULE = {"num_train_timesteps": 1000, "shift": 3.0}
RELEASED: dict[str, dict[str, Any]] = {
    "text": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 128000,
        "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "vision": {
        **VISION, "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 2048, "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "connector": {
        "hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 11946,
        "num_hidden_layers": 6, "num_queries": 128, "query_size": 2048, "input_size": 12288,
        "pooled_projection_dim": 2048, "joint_attention_dim": 4096, "layer_norm_eps": 1e-6,
    },
    "transformer": {
        **TRANSFORMER, "sample_size": 128, "num_layers": 24, "attention_head_dim": 64,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    "vae": {**VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
            "norm_num_groups": 32, "sample_size": 1024},
}  # fmt: skip
"""Configs of the real sizes, for counting on the meta device and for files of real size."""


def vlm_config(*, legacy: bool = False, released: bool = False) -> dict[str, Any]:
    """Return the language model's config.json: of transformers before 4.52, or since then."""
    text, rope = (
        (RELEASED["text"], {**ROPE, "mrope_section": [16, 24, 24]}) if released else (TEXT, ROPE)
    )
    vision = RELEASED["vision"] if released else VISION
    tokens = TOKENS
    if released:
        tokens = {
            "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
        }  # fmt: skip
    head = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **tokens,
    }
    if legacy:
        return {**head, **text, "rope_scaling": {"type": "mrope", **{k: v for k, v in rope.items() if k == "mrope_section"}},
                "vision_config": {**vision, "model_type": "qwen2_5_vl"}}  # fmt: skip
    return {
        **head, "tie_word_embeddings": True,
        "text_config": {**text, "model_type": "qwen2_5_vl_text", "rope_scaling": rope},
        "vision_config": {**vision, "model_type": "qwen2_5_vl"},
    }  # fmt: skip


def make_vlm(**options: Any) -> Any:
    """Return transformers' own Qwen2.5-VL, whole."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig.from_dict(vlm_config(**options))
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "sdpa"
    return Qwen2_5_VLForConditionalGeneration(config)


def connector_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the released connector's tensors, written down by hand."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "meta_queries": (config["num_queries"], config["query_size"]),
        "projector_1.weight": (hidden, config["input_size"]), "projector_1.bias": (hidden,),
        "projector_2.weight": (config["pooled_projection_dim"], hidden),
        "projector_2.bias": (config["pooled_projection_dim"],),
        "projector_3.weight": (config["joint_attention_dim"], hidden),
        "projector_3.bias": (config["joint_attention_dim"],),
    }  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        base = f"connector.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{base}.self_attn.{name}.weight"] = (hidden, hidden)
            shapes[f"{base}.self_attn.{name}.bias"] = (hidden,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{base}.{name}.weight"] = shapes[f"{base}.{name}.bias"] = (hidden,)
        shapes[f"{base}.mlp.fc1.weight"], shapes[f"{base}.mlp.fc1.bias"] = (inner, hidden), (inner,)
        shapes[f"{base}.mlp.fc2.weight"], shapes[f"{base}.mlp.fc2.bias"] = (
            (hidden, inner),
            (hidden,),
        )
    return shapes


def make_connector(seed: int = 5) -> dict[str, torch.Tensor]:
    """Return a connector's tensors, the two last projections not zero: or it would be blind."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in connector_shapes(CONNECTOR).items():
        scale = 0.05 if len(shape) == 1 else 0.7 / shape[-1] ** 0.5
        found[name] = torch.randn(shape, generator=generator) * scale
        if "layer_norm" in name and name.endswith("weight"):
            found[name] += 1
    return found


def make_networks(seed: int = 0) -> dict[str, Any]:
    """Return the three library networks with random float32 weights."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {
            "vlm": make_vlm(),
            "transformer": SD3Transformer2DModel(**TRANSFORMER),
            "vae": AutoencoderKL(**VAE),
        }
        for name, parameter in networks["vlm"].named_parameters():
            if parameter.ndim > 1 and name != "lm_head.weight":
                torch.nn.init.normal_(parameter, std=0.15)  # its own is nearly blind to the prompt
        for parameter in networks["transformer"].parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.8 / parameter[0].numel() ** 0.5)
    return {name: network.eval() for name, network in networks.items()}


def write_tokenizer(folder: Path) -> None:
    """Write a Qwen2 tokenizer without merges: each byte is a token, and the seven control words."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: place for place, symbol in enumerate(byte_symbols())}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    added = {
        str(place): {"content": word, "lstrip": False, "rstrip": False, "normalized": False,
                     "single_word": False, "special": True}
        for word, place in ID.items()
    }  # fmt: skip
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "add_prefix_space": False,
        "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": None,
        "bos_token": None, "added_tokens_decoder": added, "errors": "replace",
        "split_special_tokens": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def vlm_state(vlm: Any, *, legacy: bool) -> dict[str, torch.Tensor]:
    """Return a whole model's tensors under the names of a release, without the tied head."""
    state = {}
    for name, tensor in vlm.state_dict().items():
        if name == "lm_head.weight":
            continue
        bare = name.removeprefix("model.")
        if legacy:
            bare = bare.replace("language_model.", "model.", 1)
            state[bare] = tensor
        else:
            state[f"model.{bare}"] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


def write(
    folder: Path, *, dtype: torch.dtype = torch.float32, legacy: bool = False, seed: int = 0,
    dynamic: bool = False, vlm_shards: int = 2,
) -> Path:  # fmt: skip
    """Write a toy as the folder that was released; the connector in float32, as there."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder.mkdir(parents=True, exist_ok=True)
    networks = make_networks(seed)
    for name in ("transformer", "vae"):
        networks[name].to(dtype).save_pretrained(folder / name)
    (folder / "vlm").mkdir()
    state = {k: v.to(dtype) for k, v in vlm_state(networks["vlm"], legacy=legacy).items()}
    write_shards(folder / "vlm", state, vlm_shards)
    (folder / "vlm" / "config.json").write_text(json.dumps(vlm_config(legacy=legacy)))
    (folder / "connector").mkdir()
    save_file(make_connector(), folder / "connector" / "model.safetensors")
    (folder / "connector" / "config.json").write_text(json.dumps(CONNECTOR))
    schedule = {**SCHEDULE, "use_dynamic_shifting": dynamic}
    FlowMatchEulerDiscreteScheduler(**schedule).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    write_index(folder)
    return folder


def write_shards(folder: Path, state: dict[str, torch.Tensor], count: int) -> None:
    """Write tensors as `count` shards with their index."""
    names = list(state)
    per = -(-len(names) // count)
    table: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        some = names[number * per : (number + 1) * per]
        save_file({name: state[name] for name in some}, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_real_size(folder: Path) -> Path:
    """Write a folder of the released sizes and dtypes, every file sparse zeros behind its header.

    The tokenizer is the toy's: a byte is a token.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    from tests.sparse import write_sparse

    with torch.device("meta"):
        networks = {
            "transformer": SD3Transformer2DModel(**RELEASED["transformer"]),
            "vae": AutoencoderKL(**RELEASED["vae"]),
        }
        vlm = vlm_state(make_vlm(released=True), legacy=True)
    for name, network in networks.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        write_sparse(folder / name / "diffusion_pytorch_model.safetensors", shapes)
        (folder / name / "config.json").write_text(network.to_json_string())
    names = list(vlm)
    table: dict[str, str] = {}
    for number, part in enumerate((names[:628], names[628:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        write_sparse(folder / "vlm" / file, {name: tuple(vlm[name].shape) for name in part})
        table |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / "vlm" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "vlm" / "config.json").write_text(json.dumps(vlm_config(released=True)))
    shapes = connector_shapes(RELEASED["connector"])
    write_sparse(folder / "connector" / "model.safetensors", shapes, "F32")
    FlowMatchEulerDiscreteScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    write_index(folder)
    return folder


def write_index(folder: Path) -> None:
    """Write the index as it was released: three components, and a class of its own."""
    index = {
        "_class_name": ["deepgen_pipeline", "DeepGenPipeline"],
        "_diffusers_version": "0.35.2",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def write_pt(
    folder: Path, source: Path, *, names: str = "new", outer: str = "", adapters: bool = True
) -> dict[str, Any]:
    """Write a toy as the original: a .pt with adapters beside stock Qwen2.5-VL.

    Args:
        folder: gets `model.pt` and the folder `qwen`.
        source: a toy folder, whose connector, transformer and autoencoder it has.
        names: of the adapters: `new`, as transformers names layers since 4.52, or `old`.
        outer: what stands before every name.
        adapters: whether the .pt holds any.

    Returns:
        The language model's tensors with the adapters merged, by peft itself.
    """
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        vlm = make_vlm()
        for parameter in vlm.parameters():
            torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
        vlm.tie_weights()
        (folder / "qwen").mkdir(parents=True)
        state = vlm_state(vlm, legacy=True)
        save_file(state, folder / "qwen" / "model.safetensors")
        stock = {**vlm_config(legacy=True), "transformers_version": "4.41.2"}
        (folder / "qwen" / "config.json").write_text(json.dumps(stock))
        write_tokenizer(folder / "qwen")
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        layers = [n for n, m in vlm.named_modules() if isinstance(m, kinds) and n != "lm_head"]
        vlm.config.tie_word_embeddings = False  # peft would untie it, loudly
        tuned = get_peft_model(vlm, LoraConfig(r=4, lora_alpha=8, target_modules=layers))
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    merged = {
        f"lmm.{n.removeprefix('base_model.model.')}": t.clone()
        for n, t in tuned.state_dict().items()
        if "lora_" in n
    }
    expected = vlm_state(tuned.merge_and_unload(), legacy=True)
    found = {f"lmm.lm_head.lora_{half}.default.weight": torch.ones(3, 3) for half in "AB"}
    for name, tensor in merged.items() if adapters else ():
        new = name
        if names == "old":
            new = new.replace("lmm.model.language_model.", "lmm.model.").replace(
                "lmm.model.visual.", "lmm.visual."
            )
        found[new] = tensor
    found |= load_file(source / "connector" / "model.safetensors")
    weights = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    found |= {f"transformer.{name}": tensor for name, tensor in weights.items()}
    torch.save({f"{outer}{name}": tensor for name, tensor in found.items()}, folder / "model.pt")
    return expected if adapters else state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    options = parser.parse_args()
    write(options.folder, dtype=getattr(torch, options.dtype))
    print(f"{options.folder}: a toy DeepGen-1.0 with random weights")


if __name__ == "__main__":
    main()
