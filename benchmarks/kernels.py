"""Kernels of our own against the calls they replace, at the sizes of FLUX.1.

    python benchmarks/kernels.py [--size 512] [--times 7]

Seconds are the least of some runs that alternate; errors are relative to float32, or to float64.
What is called is what danqing calls, but for layers that are joined; where the processor has no
such kernel a row is left out.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from gguf.quants import dequantize

from danqing.devices import native
from danqing.devices.cpu import Cpu
from danqing.devices.native.int8 import Int8Linear
from danqing.processor import cpu_flags
from danqing.weights import unpacking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Row = tuple[str, Callable[[], Any], Callable[[], Any], Callable[[], Any] | None]

WIDTH, HEADS, INNER = 3072, 24, 12288
WORDS = 256


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def rows(size: int) -> Iterator[Row]:
    """Yield a name, our call, the one it replaces, and the truth."""
    tokens = (size // 16) ** 2 + WORDS
    if native.available(cpu_flags()):
        yield from computing(tokens)
    yield from int8(tokens)
    yield from joined(tokens)
    yield from widening()


def computing(tokens: int) -> Iterator[Row]:
    from diffusers.models.embeddings import apply_rotary_emb

    query, key, value = (draw(1, tokens, HEADS, 128).permute(0, 2, 1, 3) for _ in range(3))
    yield (
        f"attention, {HEADS} heads of 128, {tokens} tokens",
        lambda: native.attention(query, key, value, None, 128**-0.5),
        partial(F.scaled_dot_product_attention, query, key, value),
        partial(F.scaled_dot_product_attention, query.float(), key.float(), value.float()),
    )
    inner = draw(1, tokens, INNER)
    yield (
        f"GELU (tanh), {tokens} x {INNER}",
        lambda: native.gelu_tanh(inner),
        lambda: F.gelu(inner, approximate="tanh"),
        lambda: F.gelu(inner.float(), approximate="tanh"),
    )
    states, scale, shift = draw(1, tokens, WIDTH), draw(1, WIDTH), draw(1, WIDTH)

    def modulated(kind: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        normal = F.layer_norm(kind(states), (WIDTH,), eps=1e-6)
        return normal * (1 + kind(scale)[:, None]) + kind(shift)[:, None]

    yield (
        f"norm, scale and shift, {tokens} x {WIDTH}",
        lambda: native.modulated_norm(states, scale, shift, 1e-6),
        lambda: modulated(lambda one: one),
        lambda: modulated(torch.Tensor.float),
    )
    each, weight = draw(1, tokens, HEADS, 128), draw(128)
    yield (
        f"RMS norm, {tokens} x {HEADS} x 128",
        lambda: native.rms_norm(each, weight, 1e-6),
        lambda: F.rms_norm(each, (128,), weight, 1e-6),
        lambda: F.rms_norm(each.float(), (128,), weight.float(), 1e-6),
    )
    cosine, sine = torch.randn(tokens, 128), torch.randn(tokens, 128)
    yield (
        f"rotary positions, {tokens} x {HEADS} x 128",
        lambda: native.rope(each, cosine, sine),
        lambda: apply_rotary_emb(each, (cosine, sine), sequence_dim=1),
        None,
    )


def int8(tokens: int) -> Iterator[Row]:
    """Products of bytes against bfloat16's; and ours against oneDNN's."""
    for outputs, width in ((INNER, WIDTH), (WIDTH, INNER + WIDTH)):
        weight, bias, states = draw(outputs, width), draw(outputs), draw(tokens, width)
        yield (
            f"int8 layer {width} to {outputs}, {tokens} tokens, against bfloat16",
            partial(Int8Linear(weight, bias), states),
            partial(F.linear, states, weight, bias),
            partial(in_float32, states, weight, bias),
        )
        yield (
            "packing its weights, against oneDNN's",
            partial(Int8Linear, weight, None),
            partial(pack_by_onednn, weight),
            None,
        )


def joined(tokens: int) -> Iterator[Row]:
    """Layers of the same input as one product; danqing computes them apart."""
    states = draw(tokens, WIDTH)
    for name, outputs in (("query, key, value", ()), ("and the first of the MLP", (INNER,))):
        weights = [draw(size, WIDTH) for size in (WIDTH, WIDTH, WIDTH, *outputs)]
        whole = torch.cat(weights)
        yield (
            f"{name} as one product, {tokens} tokens",
            partial(F.linear, states, whole),
            partial(lambda weights: [F.linear(states, one) for one in weights], weights),
            None,
        )


def in_float32(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(states.float(), weight.float(), bias.float())


def pack_by_onednn(weight: torch.Tensor) -> Any:
    whole, _ = native.quantised(weight, signed=True)
    return torch.ops.onednn.qlinear_prepack(whole, None)


def widening() -> Iterator[Row]:
    """Weights of a single block: 113 million numbers."""
    shape = (INNER * 3, WIDTH)
    count = shape[0] * shape[1]
    data = torch.randint(0, 120, (count,), dtype=torch.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("I8", torch.int8)):
        yield (
            f"{count / 1e6:.0f} million of {name} to bfloat16",
            partial(unpacking.by_table, data, name, shape, None, torch.bfloat16),
            data.view(dtype).bfloat16,
            None,
        )
    for name in ("Q8_0", "Q4_K"):
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        number = count // elements
        packed = torch.randint(0, 120, (number * size,), dtype=torch.uint8)
        yield (
            f"{count / 1e6:.0f} million of {name} to bfloat16",
            partial(unpacking.by_block, packed, int(kind), elements, number, torch.bfloat16),
            partial(by_gguf, packed, kind, shape[0]),
            None,
        )


def by_gguf(packed: torch.Tensor, kind: Any, rows: int) -> torch.Tensor:
    return torch.from_numpy(dequantize(packed.numpy().reshape(rows, -1), kind)).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--times", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    np.seterr(all="ignore")
    print("| | ours, ms | replaced, ms | times | error ours | error replaced |")
    print("|---|---|---|---|---|---|")
    with torch.inference_mode(), Cpu().repeating():
        for name, ours, theirs, truth in rows(options.size):
            least = [float("inf")] * 2
            for _ in range(options.times):
                for number, call in enumerate((ours, theirs)):
                    start = time.perf_counter()
                    call()
                    least[number] = min(least[number], time.perf_counter() - start)
            errors = ["", ""]
            if truth is not None:
                exact = truth()
                errors = [
                    f"{float((call().float() - exact).norm() / exact.norm()):.2e}"
                    for call in (ours, theirs)
                ]
            print(
                f"| {name} | {1e3 * least[0]:.2f} | {1e3 * least[1]:.2f} | "
                f"{least[1] / least[0]:.1f} | {errors[0]} | {errors[1]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
