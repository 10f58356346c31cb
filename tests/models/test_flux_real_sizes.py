"""Every key and shape of the real FLUX.1, on the meta device and on sparse files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from danqing import models, weights
from danqing.errors import TensorMismatchError
from danqing.models.kinds import flux_transformer, kind_of, kl
from danqing.networks.loading import Piece, changed, joined, match, on_meta, shapes_of
from tests import sparse, toys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module", params=[False, True], ids=["schnell", "dev"])
def guided(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def checkpoint(guided: bool, tmp_path_factory: pytest.TempPathFactory) -> weights.Checkpoint:
    folder = sparse.write_real_size(tmp_path_factory.mktemp("real"), guided=guided)
    toys.write_clip_tokenizer(folder / "clip")
    toys.write_t5_tokenizer(folder / "t5")
    return models.open_checkpoint(folder)


def test_kind_is_read_from_the_weights(checkpoint: weights.Checkpoint, guided: bool) -> None:
    spec = models.identify(checkpoint)
    assert spec.name == ("flux1-dev" if guided else "flux1-schnell")
    assert spec.size_multiple == 16


def test_every_key_maps_with_the_right_shape(checkpoint: weights.Checkpoint, guided: bool) -> None:
    """`open_model` compares all four networks strictly; the counts are those of the facts."""
    models.open_model(checkpoint, models.identify(checkpoint))
    part = checkpoint.components
    assert len(part["transformer"].entries) == (780 if guided else 776)
    assert len(part["vae"].entries) == 244
    assert len(part["text_encoder_2"].entries) == 219
    assert len(part["text_encoder"].entries) == 196


def test_parameter_counts(checkpoint: weights.Checkpoint, guided: bool) -> None:
    def elements(name: str) -> int:
        return sum(math.prod(e.shape) for e in checkpoint.components[name].entries.values())

    assert elements("transformer") == (11_901_408_320 if guided else 11_891_178_560)
    assert elements("vae") == 83_819_683
    assert elements("text_encoder_2") == 4_762_310_656
    assert elements("text_encoder") == 123_060_480


def test_derived_configs_are_the_published_ones(
    checkpoint: weights.Checkpoint, guided: bool
) -> None:
    config = kind_of("flux_transformer").derive(checkpoint.components["transformer"])
    assert config == {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
        "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "pooled_projection_dim": 768, "guidance_embeds": guided, "axes_dims_rope": (16, 56, 56),
    }  # fmt: skip
    vae = kind_of("kl").derive(checkpoint.components["vae"])
    assert vae["block_out_channels"] == [128, 256, 512, 512]
    assert (vae["layers_per_block"], vae["latent_channels"]) == (2, 16)


def test_every_diffusers_parameter_is_filled_once(
    checkpoint: weights.Checkpoint, guided: bool
) -> None:
    from diffusers import FluxTransformer2DModel

    part = checkpoint.components["transformer"]
    module = on_meta(lambda: FluxTransformer2DModel(guidance_embeds=guided))
    rows = flux_transformer.transformer_rows(double=19, single=38, guided=guided)
    pieces = match(part, shapes_of(module), rows)
    assert pieces.keys() == dict(module.named_parameters()).keys()


def test_the_map_is_that_of_diffusers_converter() -> None:
    """One block of each kind at real width: each row says by its number where it came from."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

    shapes = sparse.bfl_transformer(guided=True, double=1, single=1)
    state = {
        name: torch.arange(shape[0], dtype=torch.float32).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        for name, shape in shapes.items()
    }  # fmt: skip
    theirs = single_file.convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    for row in flux_transformer.transformer_rows(double=1, single=1, guided=True):
        start = 0
        for target in row.targets:
            wanted = first_column(theirs.pop(target))
            piece = Piece(row.source, start, start + len(wanted), row.change)
            mine = changed(state[row.source][piece.start : piece.stop], piece.change)
            assert torch.equal(first_column(mine), wanted), target
            start = piece.stop
    assert not theirs


def first_column(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(len(tensor), -1)[:, 0]


@pytest.mark.parametrize("guided", [False, True])
def test_maps_agree_with_the_hand_written_ones_both_ways(guided: bool) -> None:
    networks = toys.make_networks(guided=guided)
    state = networks["transformer"].state_dict()
    rows = list(flux_transformer.transformer_rows(double=2, single=2, guided=guided))
    by_hand = toys.bfl_transformer(state)
    ours = {row.source: joined(row, state) for row in rows}
    assert by_hand.keys() == ours.keys()
    assert all(torch.equal(by_hand[name], ours[name]) for name in ours)
    vae = networks["vae"].state_dict()
    by_hand = toys.bfl_vae(vae)
    shortcuts = frozenset(
        n.removesuffix(".nin_shortcut.weight") for n in by_hand if n.endswith("nin_shortcut.weight")
    )
    ours = {
        row.source: joined(row, vae) for row in kl.vae_rows(levels=4, blocks=1, shortcuts=shortcuts)
    }
    assert by_hand.keys() == ours.keys()
    assert all(torch.equal(by_hand[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("head", "axes"), [(128, (16, 56, 56)), (16, (4, 6, 6)), (64, (8, 28, 28))]
)
def test_rope_axes(head: int, axes: tuple[int, int, int]) -> None:
    assert flux_transformer.rope_axes(head) == axes
    assert sum(axes) == head


def test_a_tensor_without_a_place_is_told(tmp_path: Path) -> None:
    """An autoencoder with a shortcut where the widths do not change, which diffusers has not."""
    state = toys.bfl_vae(toys.make_networks()["vae"].state_dict())
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    odd = "encoder.down.0.block.0.nin_shortcut"
    shapes |= {f"{odd}.weight": (32, 32, 1, 1), f"{odd}.bias": (32,)}
    file = sparse.write_sparse(tmp_path / "ae.safetensors", shapes, "F32")
    part = weights.Component(name="vae", style="bfl", folder=tmp_path, files=(file,))
    from diffusers import AutoencoderKL

    module = on_meta(lambda: AutoencoderKL.from_config(kind_of("kl").derive(part)))
    shortcuts = kl.shortcuts(shapes_of(module), levels=4)
    rows = kl.vae_rows(levels=4, blocks=1, shortcuts=shortcuts)
    with pytest.raises(TensorMismatchError, match="2 unexpected: encoder"):
        match(part, shapes_of(module), rows)
