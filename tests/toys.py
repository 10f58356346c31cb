"""A toy FLUX.1: the real architecture and file formats, two blocks of each kind, random weights.

As a program it writes one, so that danqing can be tried before 34 GB are downloaded:

    python tests/toys.py toy-flux                   # a diffusers folder
    python tests/toys.py toy-flux --guided          # of the dev type
    python tests/toys.py toy-flux --layout bfl      # the files of the BFL release

Its pictures are coloured noise: they show that everything works, not what FLUX.1 can paint.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

SENTENCES = (
    "a photo of a blue pizza", "a cat holding a sign that says hello world", "three blue mountains",
    "a boat on the water under a red sun", "an old pavilion in the mist among pine trees",
    "the quick brown fox jumps over the lazy dog", "a portrait of a woman in a green dress",
)  # fmt: skip

TRANSFORMER = {
    "patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 2,
    "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
    "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16,
    "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 64, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
    "force_upcast": True,
}  # fmt: skip
CLIP = {
    "vocab_size": 514, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "projection_dim": 32, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
}  # fmt: skip
T5 = {
    "vocab_size": 356, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
SCHNELL_SCHEDULE = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}
DEV_SCHEDULE = {
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5,
    "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096,
}  # fmt: skip


def byte_symbols() -> list[str]:
    """Return the 256 symbols byte-level tokenizers write bytes with (the table of GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table, extra = {}, 0
    for byte in range(256):
        if byte in plain:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return [table[byte] for byte in range(256)]


def write_clip_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer without merges: each byte is a token, with and without `</w>`."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols()
    words = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": "<|endoftext|>",
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_t5_tokenizer(folder: Path) -> None:
    """Train a sentencepiece model on a few sentences and write it as T5's spiece.model."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=80,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 100,
        "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def open_with_diffusers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Open a folder with diffusers' own pipeline, its weights where MKL is repeatable."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for parameter in getattr(pipe, name).parameters():
            # diffusers leaves weights mapped, wherever they lie in the file; MKL's last bits depend
            # on that (see test_where_a_tensor_lies_...), so both sides are compared aligned.
            parameter.data = parameter.data.clone()
    return pipe


def make_networks(*, guided: bool = False, seed: int = 0) -> dict[str, Any]:
    """Return the four networks with random float32 weights, by diffusers' component names."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {
            "transformer": FluxTransformer2DModel(**TRANSFORMER, guidance_embeds=guided),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP)),
            "text_encoder_2": T5EncoderModel(T5Config(**T5)),
        }
        for name in ("text_encoder", "text_encoder_2"):
            for parameter in networks[name].parameters():
                if parameter.ndim > 1:  # their own initialisation is nearly blind to the prompt
                    torch.nn.init.normal_(parameter, std=0.3)
    return {name: network.eval() for name, network in networks.items()}


def write_diffusers(
    folder: Path, *, guided: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0,
    max_shard_size: str = "10GB",
) -> Path:  # fmt: skip
    """Write a toy as a diffusers folder, with diffusers' and transformers' own writers."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in make_networks(guided=guided, seed=seed).items():
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
        network.save_pretrained(folder / name, max_shard_size=max_shard_size)
    schedule = DEV_SCHEDULE if guided else SCHNELL_SCHEDULE
    FlowMatchEulerDiscreteScheduler(**schedule).save_pretrained(folder / "scheduler")
    write_clip_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.38.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def bfl_transformer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a diffusers FLUX.1 transformer into the BFL release's names.

    Written out by hand from the two module trees, apart from danqing's own key map, so that the
    two check each other.
    """
    out: dict[str, torch.Tensor] = {}
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks."))
    singles = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("single_"))
    for leaf in ("weight", "bias"):
        out[f"img_in.{leaf}"] = state[f"x_embedder.{leaf}"]
        out[f"txt_in.{leaf}"] = state[f"context_embedder.{leaf}"]
        for ours, theirs in (
            ("time_in", "timestep"),
            ("vector_in", "text"),
            ("guidance_in", "guidance"),
        ):
            for layer, number in (("in_layer", 1), ("out_layer", 2)):
                key = f"time_text_embed.{theirs}_embedder.linear_{number}.{leaf}"
                if key in state:
                    out[f"{ours}.{layer}.{leaf}"] = state[key]
        out[f"final_layer.linear.{leaf}"] = state[f"proj_out.{leaf}"]
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
        for i in range(depth):
            a, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
            for s, mod, qkv, proj, ff in (
                ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
                (
                    "txt",
                    "norm1_context",
                    ("add_q_proj", "add_k_proj", "add_v_proj"),
                    "to_add_out",
                    "ff_context",
                ),
            ):
                out[f"{a}.{s}_mod.lin.{leaf}"] = state[f"{b}.{mod}.linear.{leaf}"]
                out[f"{a}.{s}_attn.qkv.{leaf}"] = torch.cat(
                    [state[f"{b}.attn.{n}.{leaf}"] for n in qkv]
                )
                out[f"{a}.{s}_attn.proj.{leaf}"] = state[f"{b}.attn.{proj}.{leaf}"]
                out[f"{a}.{s}_mlp.0.{leaf}"] = state[f"{b}.{ff}.net.0.proj.{leaf}"]
                out[f"{a}.{s}_mlp.2.{leaf}"] = state[f"{b}.{ff}.net.2.{leaf}"]
        for i in range(singles):
            a, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
            out[f"{a}.modulation.lin.{leaf}"] = state[f"{b}.norm.linear.{leaf}"]
            parts = [f"{b}.attn.to_q", f"{b}.attn.to_k", f"{b}.attn.to_v", f"{b}.proj_mlp"]
            out[f"{a}.linear1.{leaf}"] = torch.cat([state[f"{part}.{leaf}"] for part in parts])
            out[f"{a}.linear2.{leaf}"] = state[f"{b}.proj_out.{leaf}"]
    for i in range(depth):
        a, b = f"double_blocks.{i}", f"transformer_blocks.{i}.attn"
        out[f"{a}.img_attn.norm.query_norm.scale"] = state[f"{b}.norm_q.weight"]
        out[f"{a}.img_attn.norm.key_norm.scale"] = state[f"{b}.norm_k.weight"]
        out[f"{a}.txt_attn.norm.query_norm.scale"] = state[f"{b}.norm_added_q.weight"]
        out[f"{a}.txt_attn.norm.key_norm.scale"] = state[f"{b}.norm_added_k.weight"]
    for i in range(singles):
        a, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}.attn"
        out[f"{a}.norm.query_norm.scale"] = state[f"{b}.norm_q.weight"]
        out[f"{a}.norm.key_norm.scale"] = state[f"{b}.norm_k.weight"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def bfl_vae(state: dict[str, torch.Tensor], levels: int = 4) -> dict[str, torch.Tensor]:
    """Rename a diffusers AutoencoderKL into the BFL release's names, by hand as well."""
    out = {}
    for key, tensor in state.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        parts = name.split(".")
        if parts[1] == "down_blocks":
            name = ".".join([parts[0], "down", parts[2], *parts[3:]])
            name = name.replace(".resnets.", ".block.").replace(".downsamplers.0.", ".downsample.")
        elif parts[1] == "up_blocks":
            name = ".".join([parts[0], "up", str(levels - 1 - int(parts[2])), *parts[3:]])
            name = name.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")
        elif parts[1] == "mid_block":
            name = name.replace("mid_block.resnets.0", "mid.block_1").replace(
                "mid_block.resnets.1", "mid.block_2"
            )
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(
                "group_norm", "norm"
            )
            for theirs, ours in (
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "proj_out"),
            ):
                name = name.replace(f".{theirs}.", f".{ours}.")
        is_projection = ".attn_1." in name and tensor.ndim == 2
        out[name] = (tensor[:, :, None, None] if is_projection else tensor).contiguous()
    return out


def write_bfl(folder: Path, source: Path) -> Path:
    """Write the weights of a toy diffusers folder as the files of the BFL release."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, file, rename in (
        ("transformer", "flux1-toy.safetensors", bfl_transformer),
        ("vae", "ae.safetensors", bfl_vae),
    ):
        state: dict[str, torch.Tensor] = {}
        for shard in sorted((source / name).glob("*.safetensors")):
            state |= load_file(shard)
        save_file(rename(state), folder / file)
    t5, clip = folder / "t5-v1_1-toy", folder / "clip-toy"
    shutil.copytree(source / "text_encoder_2", t5)
    shutil.copytree(source / "tokenizer_2", t5, dirs_exist_ok=True)
    shutil.copytree(source / "text_encoder", clip)
    shutil.copytree(source / "tokenizer", clip, dirs_exist_ok=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--guided", action="store_true", help="of the dev type, with guidance")
    parser.add_argument("--layout", choices=("diffusers", "bfl"), default="diffusers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.layout == "diffusers":
        write_diffusers(options.folder, guided=options.guided, dtype=dtype)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            source = write_diffusers(Path(scratch), guided=options.guided, dtype=dtype)
            write_bfl(options.folder, source)
    print(f"{options.folder}: a toy FLUX.1 with random weights")


if __name__ == "__main__":
    main()
