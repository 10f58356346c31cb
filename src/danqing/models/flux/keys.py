"""Key maps of FLUX.1: the BFL release's tensor names against those of diffusers' classes.

Read off the two implementations' module trees; the order of rows is that of the modules.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from danqing.networks.loading import Change, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEAVES = ("weight", "bias")


def _both(source: str, *targets: str, change: Change = "") -> Iterator[Row]:
    """Yield the rows of a layer's weight and bias."""
    for leaf in _LEAVES:
        yield Row(f"{source}.{leaf}", tuple(f"{target}.{leaf}" for target in targets), change)


def transformer_rows(*, double: int, single: int, guided: bool) -> Iterator[Row]:
    """Yield the rows of the transformer.

    Args:
        double: number of blocks with separate text and image streams.
        single: number of blocks with one stream.
        guided: whether there is a guidance embedder.
    """
    yield from _both("img_in", "x_embedder")
    yield from _both("txt_in", "context_embedder")
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if guided:
        embedders["guidance_in"] = "guidance_embedder"
    for source, target in embedders.items():
        yield from _both(f"{source}.in_layer", f"time_text_embed.{target}.linear_1")
        yield from _both(f"{source}.out_layer", f"time_text_embed.{target}.linear_2")
    for i in range(double):
        yield from _double_rows(f"double_blocks.{i}", f"transformer_blocks.{i}")
    for i in range(single):
        yield from _single_rows(f"single_blocks.{i}", f"single_transformer_blocks.{i}")
    yield from _both("final_layer.linear", "proj_out")
    # BFL keeps (shift, scale), diffusers (scale, shift)
    yield from _both("final_layer.adaLN_modulation.1", "norm_out.linear", change="swap_halves")


def _double_rows(source: str, target: str) -> Iterator[Row]:
    attn = f"{target}.attn"
    yield from _both(f"{source}.img_mod.lin", f"{target}.norm1.linear")
    yield from _both(f"{source}.txt_mod.lin", f"{target}.norm1_context.linear")
    yield from _both(f"{source}.img_attn.qkv", *(f"{attn}.to_{part}" for part in "qkv"))
    yield from _both(f"{source}.txt_attn.qkv", *(f"{attn}.add_{part}_proj" for part in "qkv"))
    for stream, prefix in (("img", "norm_"), ("txt", "norm_added_")):
        norm = f"{source}.{stream}_attn.norm"
        yield Row(f"{norm}.query_norm.scale", (f"{attn}.{prefix}q.weight",))
        yield Row(f"{norm}.key_norm.scale", (f"{attn}.{prefix}k.weight",))
    yield from _both(f"{source}.img_attn.proj", f"{attn}.to_out.0")
    yield from _both(f"{source}.txt_attn.proj", f"{attn}.to_add_out")
    for stream, ff in (("img", "ff"), ("txt", "ff_context")):
        yield from _both(f"{source}.{stream}_mlp.0", f"{target}.{ff}.net.0.proj")
        yield from _both(f"{source}.{stream}_mlp.2", f"{target}.{ff}.net.2")


def _single_rows(source: str, target: str) -> Iterator[Row]:
    attn = f"{target}.attn"
    yield from _both(f"{source}.modulation.lin", f"{target}.norm.linear")
    parts = (*(f"{attn}.to_{part}" for part in "qkv"), f"{target}.proj_mlp")
    yield from _both(f"{source}.linear1", *parts)
    yield from _both(f"{source}.linear2", f"{target}.proj_out")
    yield Row(f"{source}.norm.query_norm.scale", (f"{attn}.norm_q.weight",))
    yield Row(f"{source}.norm.key_norm.scale", (f"{attn}.norm_k.weight",))


def vae_rows(*, levels: int, blocks: int, shortcuts: frozenset[str]) -> Iterator[Row]:
    """Yield the rows of the autoencoder.

    Args:
        levels: resolutions, the finest first.
        blocks: residual blocks at each level of the encoder; the decoder has one more.
        shortcuts: source prefixes of the residual blocks that change the number of channels.
    """
    for side in ("encoder", "decoder"):
        yield from _both(f"{side}.conv_in", f"{side}.conv_in")
        yield from _both(f"{side}.conv_out", f"{side}.conv_out")
        yield from _both(f"{side}.norm_out", f"{side}.conv_norm_out")
        yield from _mid_rows(f"{side}.mid", f"{side}.mid_block")
    for level in range(levels):
        up = levels - 1 - level  # diffusers counts the decoder's blocks in the order they run
        pairs = [
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", blocks),
            (f"decoder.up.{level}", f"decoder.up_blocks.{up}", blocks + 1),
        ]
        for source, target, count in pairs:
            for i in range(count):
                block = f"{source}.block.{i}"
                yield from _resnet_rows(block, f"{target}.resnets.{i}", shortcut=block in shortcuts)
        if level < levels - 1:
            yield from _both(
                f"encoder.down.{level}.downsample.conv",
                f"encoder.down_blocks.{level}.downsamplers.0.conv",
            )
        if level > 0:
            yield from _both(
                f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{up}.upsamplers.0.conv"
            )


def _mid_rows(source: str, target: str) -> Iterator[Row]:
    yield from _resnet_rows(f"{source}.block_1", f"{target}.resnets.0", shortcut=False)
    yield from _resnet_rows(f"{source}.block_2", f"{target}.resnets.1", shortcut=False)
    attention = f"{target}.attentions.0"
    yield from _both(f"{source}.attn_1.norm", f"{attention}.group_norm")
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for ours, theirs in names.items():
        layer = f"{source}.attn_1.{ours}"
        yield Row(f"{layer}.weight", (f"{attention}.{theirs}.weight",), "conv_to_linear")
        yield Row(f"{layer}.bias", (f"{attention}.{theirs}.bias",))


def _resnet_rows(source: str, target: str, *, shortcut: bool) -> Iterator[Row]:
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        yield from _both(f"{source}.{layer}", f"{target}.{layer}")
    if shortcut:
        yield from _both(f"{source}.nin_shortcut", f"{target}.conv_shortcut")


def llama_name(name: str) -> str:
    """Return what llama.cpp, and so GGUF files, call a tensor of T5's encoder."""
    if name in _LLAMA:
        return _LLAMA[name]
    found = _T5_LAYER.fullmatch(name)
    if found is None:
        return name
    return f"enc.blk.{found['number']}.{_LLAMA_LAYER[found['rest']]}.weight"


_LLAMA = {
    "shared.weight": "token_embd.weight",
    "encoder.embed_tokens.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
}
_LLAMA_LAYER = {
    **{f"0.SelfAttention.{part}": f"attn_{part}" for part in "qkvo"},
    "0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "0.layer_norm": "attn_norm",
    "1.DenseReluDense.wi_0": "ffn_gate",
    "1.DenseReluDense.wi_1": "ffn_up",
    "1.DenseReluDense.wo": "ffn_down",
    "1.layer_norm": "ffn_norm",
}
_T5_LAYER = re.compile(
    r"encoder\.block\.(?P<number>\d+)\.layer\."
    rf"(?P<rest>{'|'.join(map(re.escape, _LLAMA_LAYER))})\.weight"
)
