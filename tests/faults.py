"""Faults to plant in a network, and what a search for them should find.

Each is a thing that has gone wrong in somebody's port: a transposed weight, a scale dropped, another
GELU. `wanted` is the layer to be named, or the stage where no layer is to blame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

if TYPE_CHECKING:
    from collections.abc import Callable

    import danqing


@dataclass(frozen=True)
class Fault:
    """A fault in one component: what it is, how it is made, and the layer or stage to be named."""

    what: str
    component: str
    plant: Callable[[Any], object]
    wanted: str


def is_named(fault: Fault, culprit: str | None, stage: str) -> bool:
    """Say whether a search named the fault's layer, or one inside it, or the right stage."""
    _, _, layer = (culprit or "").partition("/")
    return (
        stage == fault.wanted
        or f"{layer}.".startswith(f"{fault.wanted}.")
        or (bool(layer) and layer.endswith(fault.wanted))
    )


def plant(engine: danqing.Engine, fault: Fault) -> danqing.Engine:
    """Let an engine have the fault from the moment the component is read."""
    build = engine._residence.build

    def with_fault(name: str, listen: Any) -> Any:
        module = build(name, listen)
        if name == fault.component:
            fault.plant(module)
        return module

    engine._residence.build = with_fault  # type: ignore[method-assign]
    return engine


def at(path: str, change: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda network: change(network.get_submodule(path))


def weight(
    change: Callable[[torch.Tensor], torch.Tensor], name: str = "weight"
) -> Callable[[Any], object]:
    def plant_it(layer: Any) -> None:
        changed = change(getattr(layer, name).detach().clone()).contiguous()
        setattr(layer, name, torch.nn.Parameter(changed, requires_grad=False))

    return plant_it


def output(change: Callable[[Any], Any], *, call: int = 0) -> Callable[[Any], object]:
    """Change what a layer gives, at each call or at one."""

    def plant_it(layer: Any) -> None:
        calls = 0

        def hook(_: Any, __: Any, out: Any) -> Any:
            nonlocal calls
            calls += 1
            return change(out) if call in (0, calls) else None

        layer.register_forward_hook(hook, prepend=True)

    return plant_it


def inputs(change: Callable[..., Any], *, call: int = 0) -> Callable[[Any], object]:
    """Change what a layer is given, by position."""

    def plant_it(layer: Any) -> None:
        calls = 0

        def hook(_: Any, given: Any) -> Any:
            nonlocal calls
            calls += 1
            return change(*given) if call in (0, calls) else None

        layer.register_forward_pre_hook(hook)

    return plant_it


def skipped(layer: Any) -> None:
    """Let a block of two streams hand on what it was given."""
    layer.forward = lambda hidden_states, encoder_hidden_states, **_: (
        encoder_hidden_states,
        hidden_states,
    )


def handed_on(layer: Any) -> None:
    layer.forward = lambda states: states


def reflecting(layer: Any) -> None:
    layer.padding_mode = "reflect"
    layer._reversed_padding_repeated_twice = [1, 1, 1, 1]


def smooth(layer: Any) -> None:
    """Enlarge smoothly where the nearest value should be taken."""
    layer.forward = lambda states, *_: layer.conv(
        F.interpolate(states, scale_factor=2.0, mode="bilinear", align_corners=False)
    )


def image_rope_off_by_one(ids: torch.Tensor) -> tuple[torch.Tensor]:
    moved = ids.clone()
    moved[-64:, 1] += 1
    return (moved,)


def int8(values: torch.Tensor) -> torch.Tensor:
    step = values.abs().amax() / 127
    return (values / step).round() * step


def swap_halves(values: torch.Tensor) -> torch.Tensor:
    first, second = values.chunk(2)
    return torch.cat([second, first])


def half_of(values: torch.Tensor) -> torch.Tensor:
    return values.half().to(values.dtype)


def only_queries(network: Any) -> None:
    """Pool over the queries alone, as an earlier version of the model did."""
    forward = network.forward

    def changed(states: torch.Tensor) -> Any:
        _, sequence = forward(states)
        mixed = network.projector_1(states)
        for layer in network.layers:
            mixed = layer(mixed)
        return network.projector_2(mixed[:, -len(network.meta_queries) :].mean(dim=1)), sequence

    network.forward = changed


def another_word(network: Any) -> None:
    """Move CLIP's states by one word, wherever this version of the library keeps its last norm."""
    name = next(n for n, _ in network.named_modules() if n.endswith("final_layer_norm"))
    output(lambda states: states.roll(1, 1))(network.get_submodule(name))


T, DOUBLE, SINGLE = "transformer", "transformer_blocks", "single_transformer_blocks"

POCKET: tuple[Fault, ...] = (
    Fault("a weight transposed", T, at(f"{SINGLE}.1.attn.to_q", weight(lambda w: w.T)), f"{SINGLE}.1.attn.to_q"),
    Fault("one head zeroed", T, at(f"{DOUBLE}.1.attn.to_out.0", weight(lambda w: torch.cat([w[:, :32] * 0, w[:, 32:]], 1))), f"{DOUBLE}.1.attn.to_out.0"),
    Fault("exact GELU for the tanh one", T, at(f"{DOUBLE}.0.ff.net.0", lambda m: setattr(m, "approximate", "none")), f"{DOUBLE}.0.ff.net.0"),
    Fault("a bias lost", T, at("x_embedder", weight(torch.zeros_like, "bias")), "x_embedder"),
    Fault("a norm in half precision", T, at("norm_out", output(half_of)), "norm_out"),
    Fault("rope of the picture off by one row", T, at("pos_embed.inner", inputs(image_rope_off_by_one)), "pos_embed"),
    Fault("a wrong time at step 2", T, at("time_text_embed.timestep_embedder", output(lambda x: x * 1.02, call=2)), "time_text_embed.timestep_embedder"),
    Fault("latents scaled by 1.001 at step 1", T, at("x_embedder", inputs(lambda x: (x * 1.001,), call=1)), "x_embedder"),
    Fault("a block skipped", T, at(f"{SINGLE}.3", skipped), f"{SINGLE}.3"),
    Fault("a scale of fp8 dropped", T, at(f"{DOUBLE}.1.ff.net.2", weight(lambda w: w * 448)), f"{DOUBLE}.1.ff.net.2"),
    Fault("attention not scaled", T, at(f"{DOUBLE}.0.attn.norm_q", weight(lambda w: w * 32**0.5)), f"{DOUBLE}.0.attn.norm_q"),
    Fault("a word lost", T, at("context_embedder", output(lambda x: torch.cat([x[:, :1] * 0, x[:, 1:]], 1))), "context_embedder"),
    Fault("shift and scale swapped", T, at("norm_out.linear", weight(swap_halves)), "norm_out.linear"),
    Fault("a weight rounded to int8", T, at(f"{SINGLE}.2.proj_mlp", weight(int8)), f"{SINGLE}.2.proj_mlp"),
    Fault("a stream cut off at 1", T, at(f"{SINGLE}.4.proj_out", output(lambda x: x.clamp(-1, 1))), f"{SINGLE}.4.proj_out"),
    Fault("a norm's epsilon of 0.05", "vae", at("decoder.conv_norm_out", lambda m: setattr(m, "eps", 0.05)), "decoder.conv_norm_out"),
    Fault("the latents' scale wrong by 1 %", "vae", lambda m: m.register_to_config(scaling_factor=m.config.scaling_factor * 1.01), "decode"),
    Fault("enlarged smoothly", "vae", at("decoder.up_blocks.0.upsamplers.0", smooth), "decoder.up_blocks.0.upsamplers.0"),
    Fault("a convolution padded by reflection", "vae", at("decoder.conv_in", reflecting), "decoder.conv_in"),
    Fault("channels of the picture swapped", "vae", at("decoder.conv_out", weight(lambda w: w[[2, 1, 0]])), "decoder.conv_out"),
    Fault("padding of the prompt masked", "text_encoder_2", at("encoder.final_layer_norm", output(lambda x: torch.cat([x[:, :20], x[:, 20:] * 0], 1))), "encoder.final_layer_norm"),
    Fault("the state of another word pooled", "text_encoder", another_word, "final_layer_norm"),
)  # fmt: skip

DEEPGEN: tuple[Fault, ...] = (
    Fault("a norm of queries with half its weight", T, at("transformer_blocks.1.attn.norm_q", weight(lambda w: w / 2)), "transformer_blocks.1.attn.norm_q"),
    Fault("a layer of the connector skipped", "connector", at("layers.1", handed_on), "layers.1"),
    Fault("pooled over the queries alone", "connector", only_queries, "encode"),
    Fault("rotary frequencies off by 1 %", "vlm", at("language_model.rotary_emb", lambda m: setattr(m, "inv_freq", m.inv_freq * 1.01)), "rotary_emb"),
    Fault("a norm of the vision tower halved", "vlm", at("visual.blocks.0.norm1", weight(lambda w: w / 2)), "visual.blocks.0.norm1"),
    Fault("places shifted by a row", T, at("pos_embed", output(lambda x: x.roll(1, 1))), "pos_embed"),
    Fault("a feed-forward of block 2 lost", T, at("transformer_blocks.2.ff.net.2", weight(torch.zeros_like)), "transformer_blocks.2.ff.net.2"),
    Fault("a bias of the autoencoder lost", "vae", at("decoder.conv_in", weight(torch.zeros_like, "bias")), "decoder.conv_in"),
)  # fmt: skip
