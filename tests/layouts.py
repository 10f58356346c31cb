"""Writes a toy FLUX.1 in the layouts people have, with writers that are not danqing's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests import toys

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    State = dict[str, torch.Tensor]

COMFY = "model.diffusion_model."
FP8_MAX = 448.0


def states(folder: Path) -> dict[str, State]:
    """Return the four networks of a diffusers folder in the names of single files."""
    found: dict[str, State] = {}
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        found[name] = {}
        for shard in sorted((folder / name).glob("*.safetensors")):
            found[name] |= load_file(shard)
    clip = found["text_encoder"]
    return {
        "transformer": toys.bfl_transformer(found["transformer"]),
        "vae": toys.bfl_vae(found["vae"]),
        "text_encoder": {
            f"text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in clip.items()
            if "position_ids" not in name
        },
        "text_encoder_2": found["text_encoder_2"],
    }


def prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    return {f"{prefix}{name}": tensor.clone() for name, tensor in state.items()}


def all_in_one(parts: Mapping[str, State]) -> State:
    """Return one state with ComfyUI's four prefixes."""
    return {
        **prefixed(COMFY, parts["transformer"]),
        **prefixed("text_encoders.clip_l.transformer.", parts["text_encoder"]),
        **prefixed("text_encoders.t5xxl.transformer.", parts["text_encoder_2"]),
        **prefixed("vae.", parts["vae"]),
    }


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """Say whether tools store a tensor in fewer bits: the weights of linear layers."""
    return tensor.ndim == 2 and name.endswith(".weight") and "norm" not in name


def fp8_plain(state: Mapping[str, torch.Tensor]) -> State:
    return {
        name: tensor.to(torch.float8_e4m3fn) if is_matrix(name, tensor) else tensor
        for name, tensor in state.items()
    }


def fp8_scaled(state: Mapping[str, torch.Tensor], spelling: str, *, by_row: bool = False) -> State:
    """Scale each matrix to fill the range of fp8; `spelling` is the ending of the scales."""
    out: State = {}
    for name, tensor in state.items():
        if not is_matrix(name, tensor):
            out[name] = tensor
            continue
        peak = tensor.abs().amax(dim=1) if by_row else tensor.abs().max()
        scale = (peak.float() / FP8_MAX).clamp(min=1e-12)
        rows = scale[:, None] if by_row else scale
        out[name] = (tensor.float() / rows).to(torch.float8_e4m3fn)
        layer = name.removesuffix(".weight")
        out[f"{layer}{spelling}"] = scale
        out[f"{layer}{'.scale_input' if spelling == '.scale_weight' else '.input_scale'}"] = (
            torch.ones(())
        )
    if spelling == ".scale_weight":
        out["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return out


def widened(state: Mapping[str, torch.Tensor]) -> State:
    """Undo both fp8 forms by hand, in float32."""
    out: State = {}
    for name, tensor in state.items():
        if name.endswith((".scale_weight", ".weight_scale")) or "input" in name.split(".")[-1]:
            continue
        if name == "scaled_fp8":
            continue
        value = tensor.float()
        layer = name.removesuffix(".weight")
        for ending in (".scale_weight", ".weight_scale"):
            if f"{layer}{ending}" in state and name.endswith(".weight"):
                scale = state[f"{layer}{ending}"]
                value = value * (scale[:, None] if scale.ndim else scale)
        out[name] = value
    return out


def llama_t5(state: Mapping[str, torch.Tensor]) -> State:
    """Rename a T5 encoder as llama.cpp does, by hand."""
    out: State = {}
    for name, tensor in state.items():
        if name in ("shared.weight", "encoder.embed_tokens.weight"):
            out["token_embd.weight"] = tensor
        elif name == "encoder.final_layer_norm.weight":
            out["enc.output_norm.weight"] = tensor
        else:
            _, _, number, _, sub, *rest = name.split(".")
            leaf = ".".join(rest[:-1])
            ours = {
                "SelfAttention.q": "attn_q", "SelfAttention.k": "attn_k",
                "SelfAttention.v": "attn_v", "SelfAttention.o": "attn_o",
                "SelfAttention.relative_attention_bias": "attn_rel_b",
                "DenseReluDense.wi_0": "ffn_gate", "DenseReluDense.wi_1": "ffn_up",
                "DenseReluDense.wo": "ffn_down",
                "layer_norm": "attn_norm" if sub == "0" else "ffn_norm",
            }[leaf]  # fmt: skip
            out[f"enc.blk.{number}.{ours}.weight"] = tensor
    return out


def write_gguf(path: Path, arch: str, state: Mapping[str, torch.Tensor], kind: str) -> State:
    """Write a GGUF file with the library gguf; return what its own reader gives back.

    Matrices whose rows are whole blocks are of the kind, all other tensors float32.
    """
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[number]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_uint32("general.quantization_version", 2)
    writer.add_array("tokenizer.ggml.tokens", [f"piece {i}" for i in range(100)])
    random = np.random.default_rng(0)
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if not is_matrix(name, tensor) or values.shape[-1] % block or kind == "F32":
            writer.add_tensor(name, values)
        else:
            data = _blocks(values, number, random)
            writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf(path)


def _blocks(values: Any, number: Any, random: np.random.Generator) -> Any:
    """Quantise; for kinds the library only reads, make up blocks with scales of a sane size."""
    import gguf

    if number == gguf.GGMLQuantizationType.F16:
        return values.astype(np.float16)
    try:
        return gguf.quants.quantize(values, number)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[number]
        count = values.shape[-1] // block
        data = random.integers(0, 256, (*values.shape[:-1], count, size), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.0008).tobytes(), np.uint8)
        places = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}
        for place in places[number.name]:
            data[..., place : place + 2] = scale
        return data.reshape(*values.shape[:-1], count * size)


def read_gguf(path: Path) -> State:
    """Read a GGUF file with the library's own reader, widened to float32."""
    import gguf

    found: State = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        shape = [int(side) for side in tensor.shape[::-1]]
        found[tensor.name] = torch.from_numpy(np.array(values, np.float32)).reshape(shape)
    return found


def write_tokenizers(folder: Path) -> dict[str, Path]:
    toys.write_clip_tokenizer(folder / "tokenizer")
    toys.write_t5_tokenizer(folder / "tokenizer_2")
    return {"tokenizer": folder / "tokenizer", "tokenizer_2": folder / "tokenizer_2"}


def write_hub_cache(cache: Path, repository: str, source: Path) -> Path:
    """Put a folder into a Hugging Face cache as the hub's client lays it out; return the snapshot."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / revision
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        blob = home / "blobs" / f"{number:064x}"
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def save(path: Path, state: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()}, path,
        metadata=metadata or None,
    )  # fmt: skip
    return path


def change_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors header in place of the old one, leaving the data as it is."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
