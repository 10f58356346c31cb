"""Safetensors files of real size without the bytes: a true header over a sparse file of zeros."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header, place = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    return path


def bfl_transformer(
    *, guided: bool, hidden: int = 3072, double: int = 19, single: int = 38
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the BFL release, written down from its module tree."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    linear("img_in", hidden, 64)
    linear("txt_in", hidden, 4096)
    for name, width in [("time_in", 256), ("vector_in", 768), *([("guidance_in", 256)] * guided)]:
        linear(f"{name}.in_layer", hidden, width)
        linear(f"{name}.out_layer", hidden, hidden)
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * hidden, hidden)
            linear(f"{block}_attn.qkv", 3 * hidden, hidden)
            linear(f"{block}_attn.proj", hidden, hidden)
            shapes[f"{block}_attn.norm.query_norm.scale"] = (128,)
            shapes[f"{block}_attn.norm.key_norm.scale"] = (128,)
            linear(f"{block}_mlp.0", 4 * hidden, hidden)
            linear(f"{block}_mlp.2", hidden, 4 * hidden)
    for i in range(single):
        block = f"single_blocks.{i}"
        linear(f"{block}.linear1", 7 * hidden, hidden)
        linear(f"{block}.linear2", hidden, 5 * hidden)
        linear(f"{block}.modulation.lin", 3 * hidden, hidden)
        shapes[f"{block}.norm.query_norm.scale"] = (128,)
        shapes[f"{block}.norm.key_norm.scale"] = (128,)
    linear("final_layer.linear", 64, hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return shapes


def bfl_vae() -> dict[str, tuple[int, ...]]:
    """Names and shapes of ae.safetensors: ch 128, multipliers 1 2 4 4, two blocks a level."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, out: int, *rest: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, *rest), (out,)

    def resnet(name: str, ins: int, outs: int) -> None:
        layer(f"{name}.norm1", ins)
        layer(f"{name}.conv1", outs, ins, 3, 3)
        layer(f"{name}.norm2", outs)
        layer(f"{name}.conv2", outs, outs, 3, 3)
        if ins != outs:
            layer(f"{name}.nin_shortcut", outs, ins, 1, 1)

    def middle(name: str) -> None:
        resnet(f"{name}.block_1", 512, 512)
        resnet(f"{name}.block_2", 512, 512)
        layer(f"{name}.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.attn_1.{part}", 512, 512, 1, 1)

    widths = [128, 256, 512, 512]
    layer("encoder.conv_in", 128, 3, 3, 3)
    for level, (ins, outs) in enumerate(zip([128, *widths[:-1]], widths, strict=True)):
        resnet(f"encoder.down.{level}.block.0", ins, outs)
        resnet(f"encoder.down.{level}.block.1", outs, outs)
        if level < 3:
            layer(f"encoder.down.{level}.downsample.conv", outs, outs, 3, 3)
    middle("encoder.mid")
    layer("encoder.norm_out", 512)
    layer("encoder.conv_out", 32, 512, 3, 3)
    layer("decoder.conv_in", 512, 16, 3, 3)
    middle("decoder.mid")
    for level, (ins, outs) in enumerate(zip([256, 512, 512, 512], widths, strict=True)):
        for i in range(3):
            resnet(f"decoder.up.{level}.block.{i}", ins if i == 0 else outs, outs)
        if level > 0:
            layer(f"decoder.up.{level}.upsample.conv", outs, outs, 3, 3)
    layer("decoder.norm_out", 128)
    layer("decoder.conv_out", 3, 128, 3, 3)
    return shapes


def t5_xxl() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (32128, 4096)}
    for i in range(24):
        attention, feed = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{part}.weight": (4096, 4096) for part in "qkvo"}
        shapes[f"{attention}.layer_norm.weight"] = shapes[f"{feed}.layer_norm.weight"] = (4096,)
        shapes |= {
            f"{feed}.DenseReluDense.{part}.weight": (10240, 4096) for part in ("wi_0", "wi_1")
        }
        shapes[f"{feed}.DenseReluDense.wo.weight"] = (4096, 10240)
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    shapes["encoder.final_layer_norm.weight"] = (4096,)
    return shapes


def clip_l() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        "text_model.final_layer_norm.weight": (768,),
        "text_model.final_layer_norm.bias": (768,),
    }
    for i in range(12):
        layer = f"text_model.encoder.layers.{i}"
        rows = {f"self_attn.{part}_proj": (768, 768) for part in ("q", "k", "v", "out")}
        rows |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
        for name, shape in rows.items():
            shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = shape, shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (768,)
    return shapes


T5_CONFIG = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 32128, "d_model": 4096,
    "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
}  # fmt: skip
CLIP_CONFIG = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408,
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "projection_dim": 768,
}  # fmt: skip


def write_real_size(folder: Path, *, guided: bool) -> Path:
    """Write a whole FLUX.1 in the BFL layout at its real size, 34 GB of which take no disk."""
    write_sparse(folder / "flux1.safetensors", bfl_transformer(guided=guided))
    write_sparse(folder / "ae.safetensors", bfl_vae(), "F32")
    write_sparse(folder / "t5" / "model.safetensors", t5_xxl())
    write_sparse(folder / "clip" / "model.safetensors", clip_l())
    (folder / "t5" / "config.json").write_text(json.dumps(T5_CONFIG))
    (folder / "clip" / "config.json").write_text(json.dumps(CLIP_CONFIG))
    return folder


FLUX = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
FLUX_VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
    "force_upcast": True,
}  # fmt: skip


def write_shards(
    folder: Path, stem: str, shapes: Mapping[str, tuple[int, ...]], *, gigabytes: float = 10
) -> None:
    """Write sparse shards as the libraries do: filled in the module's order, each sorted by name.

    So the blocks of a hub's file do not lie in the order in which they are computed.
    """
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * BYTES["BF16"]
        if size + more > gigabytes * 1e9 and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += more
    if len(parts) == 1:
        write_sparse(folder / f"{stem}.safetensors", dict(sorted(parts[0].items())))
        return
    table: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        write_sparse(folder / file, dict(sorted(part.items())))
        table |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_diffusers(folder: Path, *, double: int = 19, single: int = 38) -> Path:
    """Write FLUX.1-schnell as its diffusers folder, with real shapes; see `toys` for the rest."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    from tests import toys

    toys.write_diffusers(folder)  # its small files: tokenizers, schedule, index
    config: dict[str, Any] = {**FLUX, "num_layers": double, "num_single_layers": single}
    with torch.device("meta"):
        networks = {
            "transformer": FluxTransformer2DModel(**config),
            "vae": AutoencoderKL(**FLUX_VAE),
        }
    for name, network in networks.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        _empty(folder / name)
        write_shards(folder / name, "diffusion_pytorch_model", shapes)
        (folder / name / "config.json").write_text(network.to_json_string())
    texts = {"text_encoder": (clip_l(), CLIP_CONFIG), "text_encoder_2": (t5_xxl(), T5_CONFIG)}
    for name, (shapes, text_config) in texts.items():
        _empty(folder / name)
        write_shards(folder / name, "model", shapes, gigabytes=5)
        (folder / name / "config.json").write_text(json.dumps(text_config))
    return folder


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
