"""The autoencoder of Stable Diffusion and its heirs: diffusers' AutoencoderKL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from danqing.models import config_tables
from danqing.models.config_tables import Config
from danqing.models.kinds.base import NetworkKind, count, side
from danqing.networks.loading import Row, both, identity_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from danqing.weights import Component

GROUPS = 32
PIXEL_COPIES = 8
"""Numbers the decoder holds for each pixel and channel of its last level."""
_LARGE_CHANNELS = 128


class AutoencoderKL(NetworkKind):
    """Convolutions between pixels and latents; names of diffusers or of the BFL release.

    Scale and shift of the latents are not in the weights: a family whose autoencoders come without
    a config says them in `Model.assumed`.
    """

    table: ClassVar[config_tables.Kind] = config_tables.AUTOENCODER
    class_name: ClassVar[str] = "AutoencoderKL"
    counted: ClassVar[tuple[str, ...]] = (
        "block_out_channels", "down_block_types", "up_block_types", "layers_per_block",
    )  # fmt: skip
    overflow: ClassVar[str] = "its activations may overflow in float16"

    def read_config(self, part: Component, assumed: Mapping[str, Any]) -> Config:
        """Return its config; without one, the family must know scale and shift."""
        if part.config is None and "scaling_factor" not in assumed:
            return Config(values=super().derive(part))  # raises
        return super().read_config(part, assumed)

    def derive(self, part: Component) -> dict[str, Any]:
        """Return the config that the shapes tell."""
        down, block = "encoder.down", "block"
        if part.style == "diffusers":
            down, block = "encoder.down_blocks", "resnets"
        levels = count(part, f"{down}.")
        return {
            "in_channels": side(part, "encoder.conv_in.weight", 1),
            "out_channels": side(part, "decoder.conv_out.weight", 0),
            "latent_channels": side(part, "decoder.conv_in.weight", 1),
            "block_out_channels": [
                side(part, f"{down}.{i}.{block}.0.conv1.weight", 0) for i in range(levels)
            ],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": count(part, f"{down}.0.{block}."),
            "norm_num_groups": GROUPS,
            "sample_size": 1024,
            "use_quant_conv": "quant_conv.weight" in part.entries,
            "use_post_quant_conv": "post_quant_conv.weight" in part.entries,
            "mid_block_add_attention": True,
            "force_upcast": True,
        }

    def make(self, values: Mapping[str, Any]) -> Any:
        """Make diffusers' AutoencoderKL."""
        from diffusers import AutoencoderKL as Network

        return Network.from_config(dict(values))

    def rows(
        self, part: Component, values: Mapping[str, Any], shapes: Mapping[str, Any]
    ) -> Iterable[Row]:
        """Return the key map of the BFL release, or of diffusers' own names."""
        if part.style != "bfl":
            return identity_rows(shapes)
        levels = len(values["block_out_channels"])
        return vae_rows(
            levels=levels,
            blocks=values["layers_per_block"],
            shortcuts=shortcuts(shapes, levels=levels),
        )

    def finish(self, module: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Lay convolutions out by pixels where that is faster: large ones, in bfloat16 on a CPU.

        Decoding 512x512 took 3.2 s against 3.9 s (decision 0014).
        """
        large = module.config["block_out_channels"][0] >= _LARGE_CHANNELS
        if large and device.type == "cpu" and dtype is torch.bfloat16:
            module.apply(_channels_last)

    def numbers(self, config: Any) -> int:
        """Return what is held for each pixel."""
        return int(config.block_out_channels[0]) * PIXEL_COPIES

    def flops(self, config: Any, elements: int, tokens: int) -> float:  # noqa: ARG002
        """Count the convolutions that turn latents into so many pixels."""
        widths = [int(width) for width in reversed(config.block_out_channels)]
        layers = int(config.layers_per_block) + 1
        total, before = 0.0, widths[0]
        for level, width in enumerate(widths):
            here = tokens / 4 ** (len(widths) - 1 - level)
            total += here * 18 * (before * width + (2 * layers - 1) * width * width)
            if level < len(widths) - 1:
                total += 4 * here * 18 * width * width
            before = width
        return total


def per_latent(config: Any) -> int:
    """Return how many pixels one latent stands for, along a side."""
    return int(2 ** (len(config.block_out_channels) - 1))


def factors(config: Any) -> tuple[float, float]:
    """Return scale and shift: latents = scale * (z - shift)."""
    return float(config.scaling_factor), float(config.shift_factor or 0.0)


def _channels_last(layer: torch.nn.Module) -> None:
    if isinstance(layer, torch.nn.Conv2d):
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


# --- names of the BFL release --------------------------------------------------------------------


def vae_rows(*, levels: int, blocks: int, shortcuts: frozenset[str]) -> Iterator[Row]:
    """Yield the rows of the autoencoder.

    Args:
        levels: resolutions, the finest first.
        blocks: residual blocks at each level of the encoder; the decoder has one more.
        shortcuts: source prefixes of the residual blocks that change the number of channels.
    """
    for half in ("encoder", "decoder"):
        yield from both(f"{half}.conv_in", f"{half}.conv_in")
        yield from both(f"{half}.conv_out", f"{half}.conv_out")
        yield from both(f"{half}.norm_out", f"{half}.conv_norm_out")
        yield from _mid_rows(f"{half}.mid", f"{half}.mid_block")
    for level in range(levels):
        up = levels - 1 - level  # diffusers counts the decoder's blocks in the order they run
        pairs = [
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", blocks),
            (f"decoder.up.{level}", f"decoder.up_blocks.{up}", blocks + 1),
        ]
        for source, target, depth in pairs:
            for i in range(depth):
                block = f"{source}.block.{i}"
                yield from _resnet_rows(block, f"{target}.resnets.{i}", shortcut=block in shortcuts)
        if level < levels - 1:
            yield from both(
                f"encoder.down.{level}.downsample.conv",
                f"encoder.down_blocks.{level}.downsamplers.0.conv",
            )
        if level > 0:
            yield from both(
                f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{up}.upsamplers.0.conv"
            )


def _mid_rows(source: str, target: str) -> Iterator[Row]:
    yield from _resnet_rows(f"{source}.block_1", f"{target}.resnets.0", shortcut=False)
    yield from _resnet_rows(f"{source}.block_2", f"{target}.resnets.1", shortcut=False)
    attention = f"{target}.attentions.0"
    yield from both(f"{source}.attn_1.norm", f"{attention}.group_norm")
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for ours, theirs in names.items():
        layer = f"{source}.attn_1.{ours}"
        yield Row(f"{layer}.weight", (f"{attention}.{theirs}.weight",), "conv_to_linear")
        yield Row(f"{layer}.bias", (f"{attention}.{theirs}.bias",))


def _resnet_rows(source: str, target: str, *, shortcut: bool) -> Iterator[Row]:
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        yield from both(f"{source}.{layer}", f"{target}.{layer}")
    if shortcut:
        yield from both(f"{source}.nin_shortcut", f"{target}.conv_shortcut")


def shortcuts(targets: Iterable[str], *, levels: int) -> frozenset[str]:
    """Return the BFL names of the residual blocks that change the number of channels.

    Args:
        targets: names of diffusers' module.
        levels: resolutions.
    """
    mark = ".conv_shortcut.weight"
    found = set()
    for name in targets:
        if name.endswith(mark):
            half, _, level, _, block = name.removesuffix(mark).split(".")
            number = int(level) if half == "encoder" else levels - 1 - int(level)
            found.add(f"{half}.{'down' if half == 'encoder' else 'up'}.{number}.block.{block}")
    return frozenset(found)
