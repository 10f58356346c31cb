"""What `of_diffusers`, `of_transformers` and `of_torch` rely on inside these libraries.

Each trick is compared with the library itself: a version that is made differently inside fails here
and says which function to look at.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from danqing.networks import of_diffusers, of_torch, of_transformers
from danqing.networks.kernels import let_go
from danqing.networks.loading import on_meta

if TYPE_CHECKING:
    from collections.abc import Callable

NORMALIZATION = "diffusers.models.normalization"
QWEN = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
NAMES = [
    ("of_diffusers.fuse_gelu", "diffusers.models.activations", "GELU.gelu"),
    ("of_diffusers.fuse_modulated_norm", NORMALIZATION, "AdaLayerNormZero.forward"),
    ("of_diffusers.fuse_modulated_norm", NORMALIZATION, "AdaLayerNormZeroSingle.forward"),
    ("of_diffusers.fuse_modulated_norm", NORMALIZATION, "AdaLayerNormContinuous.forward"),
    ("of_diffusers.modulations", NORMALIZATION, "SD35AdaLayerNormZeroX.forward"),
    ("of_diffusers.choose_by_tensor", NORMALIZATION, "RMSNorm.forward"),
    ("of_diffusers.choose_by_tensor", "diffusers.models.activations", "GEGLU.forward"),
    ("of_diffusers.fuse_group_norms", "diffusers.models.resnet", "ResnetBlock2D.forward"),
    ("of_diffusers.fuse_group_norms", "diffusers.models.autoencoders.vae", "Decoder.forward"),
    ("of_diffusers.fuse_rope", "diffusers.models.transformers.transformer_flux",
     "FluxAttnProcessor.__call__"),
    ("of_diffusers.fuse_rope", "diffusers.models.transformers.transformer_flux",
     "apply_rotary_emb"),
    ("of_diffusers.run_sd3", "diffusers", "SD3Transformer2DModel.forward"),
    ("of_transformers.run_without_attention", QWEN, "Qwen2_5_VLDecoderLayer.forward"),
    ("of_transformers.sentencepiece_proto", "transformers.convert_slow_tokenizer",
     "import_protobuf"),
    ("of_torch.compiled_folder", "torch._inductor.runtime.cache_dir_utils", "default_cache_dir"),
    ("of_torch.while_compiling", "torch._dynamo.callback",
     "callback_handler.register_start_callback"),
]  # fmt: skip


def broken(trick: str, what: str) -> str:
    """Return what to say of a trick that no longer fits."""
    library = {"of_diffusers": "diffusers", "of_torch": "torch"}.get(
        trick.split(".", maxsplit=1)[0], "transformers"
    )
    return f"{library} {version(library)} is made differently: {what}; see networks/{trick}"


@pytest.mark.parametrize(("trick", "module", "path"), NAMES)
def test_names_that_are_relied_on_exist(trick: str, module: str, path: str) -> None:
    try:
        place: Any = importlib.import_module(module)
        for name in path.split("."):
            place = getattr(place, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(broken(trick, str(error)))


def filled(layer: torch.nn.Module) -> Any:
    """Fill a layer with random weights."""
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return layer.eval().requires_grad_(requires_grad=False)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def check_trick(
    trick: str, layer: Any, change: Callable[[Any], object], *inputs: torch.Tensor, **named: Any
) -> None:
    """Compare a changed layer with the layer as the library has it, and change it back."""
    theirs = layer(*inputs, **named)
    change(layer)
    ours = layer(*inputs, **named)
    let_go(layer)
    for mine, other in zip(as_tuple(ours), as_tuple(theirs), strict=True):
        torch.testing.assert_close(
            mine, other, msg=lambda text: broken(trick, f"{type(layer).__name__} ({text})")
        )


def as_tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


class Kernel:
    """Computes with a function, or with None leaves the layer to itself; counts its calls."""

    def __init__(self, compute: Callable[..., torch.Tensor] | None) -> None:
        self.compute = compute
        self.calls = 0

    def __call__(self, *inputs: Any) -> torch.Tensor | None:
        self.calls += 1
        return None if self.compute is None else self.compute(*inputs)


def modulated(states: Any, scale: Any, shift: Any, eps: float) -> Any:
    normal = F.layer_norm(states, states.shape[-1:], eps=eps)
    return normal * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("compute", [modulated, None])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("AdaLayerNormZero", (8,)), ("AdaLayerNormZeroSingle", (8,)),
        ("AdaLayerNormContinuous", (8, 8, False, 1e-6)),
    ],
)  # fmt: skip
def test_the_fused_adaln_norms(name: str, arguments: Any, compute: Any) -> None:
    from diffusers.models import normalization

    layer = filled(getattr(normalization, name)(*arguments))
    kernel = Kernel(compute)
    change = partial(of_diffusers.fuse_modulated_norm, kernel=kernel)
    named = {} if name == "AdaLayerNormContinuous" else {"emb": draw(2, 8)}
    inputs = (draw(2, 5, 8), draw(2, 8)) if not named else (draw(2, 5, 8),)
    check_trick("of_diffusers._modulated", layer, change, *inputs, **named)
    assert kernel.calls == 1


def test_the_fused_gelus() -> None:
    from diffusers.models.activations import GELU

    for layer in (GELU(8, 12, approximate="tanh"), torch.nn.GELU(approximate="tanh")):
        kernel = Kernel(lambda states: F.gelu(states, approximate="tanh"))
        change = partial(of_diffusers.fuse_gelu, kernel=kernel)
        check_trick("of_diffusers.fuse_gelu", filled(layer), change, draw(3, 8))
        assert kernel.calls == 1


def norm_silu(states: Any, weight: Any, bias: Any, groups: int, eps: float) -> torch.Tensor:
    return F.silu(F.group_norm(states, groups, weight, bias, eps))


def fuse_all_group_norms(module: torch.nn.Module, kernel: Kernel) -> None:
    for layer in list(module.modules()):
        of_diffusers.fuse_group_norms(layer, kernel)


def test_the_fused_group_norms() -> None:
    """Of a whole autoencoder: a SiLU in another place would be lost, or be applied twice."""
    from diffusers import AutoencoderKL

    from tests.toys import VAE

    network = filled(AutoencoderKL(**VAE))
    for part, channels in ((network.encoder, 3), (network.decoder, 16)):
        kernel = Kernel(norm_silu)
        change = partial(fuse_all_group_norms, kernel=kernel)
        check_trick("of_diffusers.fuse_group_norms", part, change, draw(1, channels, 16, 16))
        silus = sum(type(layer) is torch.nn.Identity for layer in part.modules())
        assert kernel.calls == 2 * silus - 1  # a block has two norms, the end has one


@pytest.mark.parametrize("guided", [False, True])
def test_the_fused_rotation(guided: bool) -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    from tests.toys import make_networks

    transformer = make_networks(guided=guided)["transformer"].requires_grad_(requires_grad=False)
    kernel = Kernel(
        lambda states, cosine, sine: apply_rotary_emb(states, (cosine, sine), sequence_dim=1)
    )
    config = transformer.config
    inputs = {
        "hidden_states": draw(1, 6, config.in_channels),
        "encoder_hidden_states": draw(1, 4, config.joint_attention_dim),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(4, 3),
        "guidance": torch.tensor([3.0]) if guided else None,
    }  # fmt: skip
    theirs = transformer(**inputs).sample
    of_diffusers.fuse_rope(transformer, kernel)
    assert torch.equal(transformer(**inputs).sample, theirs), broken("of_diffusers._with_rope", "")
    blocks = config.num_layers + config.num_single_layers
    assert kernel.calls == 2 * blocks, broken("of_diffusers._with_rope", "rotates elsewhere")


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_every_adaln_layer_is_hoisted(family: str) -> None:
    """A norm class that diffusers adds must be looked at: does its input depend on the step alone?"""
    from tests import deepgen_toys, toys

    make = toys.make_networks if family == "flux" else deepgen_toys.make_networks
    transformer = make()["transformer"]
    paths = of_diffusers.modulations(transformer)
    norms = {
        f"{name}.linear"
        for name, layer in transformer.named_modules()
        if "AdaLayerNorm" in type(layer).__name__
    }
    assert set(paths) == norms != set(), broken("of_diffusers.modulations", "another adaLN norm")
    for path in paths:
        assert type(transformer.get_submodule(path)) is torch.nn.Linear
        norm = transformer.get_submodule(path.rpartition(".")[0])
        assert "self.linear(self.silu(" in inspect.getsource(type(norm).forward), broken(
            "of_diffusers.modulations", type(norm).__name__
        )


def test_the_line_about_attention_backends(caplog: pytest.LogCaptureFixture) -> None:
    from tests.toys import make_networks

    transformer = make_networks()["transformer"]
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        of_diffusers.set_attention_backend(transformer, "_native_math")
        assert caplog.messages == [], broken("of_diffusers.set_attention_backend", "another text")
        transformer.set_attention_backend("_native_math")
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages, broken("of_diffusers.set_attention_backend", "it is no longer logged")


def test_positions_that_no_file_keeps() -> None:
    from tests.toys import make_networks

    clip = make_networks()["text_encoder"]
    buffers = {n: b for n, b in clip.named_buffers() if n not in clip.state_dict()}
    assert {name.rpartition(".")[2] for name in buffers} == {"position_ids"}
    for buffer in buffers.values():
        assert torch.equal(of_transformers.unsaved_buffer("position_ids", buffer.shape), buffer)
    with pytest.raises(RuntimeError, match="no rule for the buffer table"):
        of_transformers.unsaved_buffer("table", torch.Size([3]))


@pytest.fixture(scope="module")
def vlm() -> Any:
    from tests.deepgen_toys import make_networks

    return make_networks()["vlm"].model.requires_grad_(requires_grad=False)


def test_an_sd3_transformer_driven_from_outside() -> None:
    from tests.deepgen_toys import make_networks

    transformer = make_networks()["transformer"].requires_grad_(requires_grad=False)
    config = transformer.config
    latents = draw(2, config.in_channels, 8, 12)
    context, pooled = draw(2, 5, config.joint_attention_dim), draw(2, config.pooled_projection_dim)
    timestep = torch.tensor([300.0, 700.0])
    ours = of_diffusers.run_sd3(transformer, [latents], context, pooled, timestep)
    theirs = transformer(latents, context, pooled, timestep).sample
    assert torch.equal(ours, theirs), broken("of_diffusers.run_sd3", "SD3Transformer2DModel")


def test_rotary_tables_are_the_library_s(vlm: Any) -> None:
    from transformers import AutoModel

    empty = on_meta(lambda: AutoModel.from_config(vlm.config, attn_implementation="sdpa"))
    parts = {"language_model": empty.language_model, "visual": empty.visual}
    for name, part in parts.items():
        of_transformers.fill_rotary_tables(part)
        tables = {n: b for n, b in part.named_buffers() if n.endswith("inv_freq")}
        assert tables, broken("of_transformers.fill_rotary_tables", "no table is called inv_freq")
        for path, table in tables.items():
            expected = vlm.get_submodule(name).get_buffer(path)
            assert torch.equal(table, expected), broken("of_transformers.fill_rotary_tables", path)
        left = [n for n, b in part.named_buffers() if b.is_meta]
        assert not left, broken("of_transformers.fill_rotary_tables", f"{left} is not filled")


def test_a_layer_without_its_attention(vlm: Any) -> None:
    from copy import deepcopy

    text = vlm.language_model
    layer = deepcopy(text.layers[0])
    torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    states = draw(1, 4, text.config.hidden_size)
    tables = text.rotary_emb(states, torch.arange(4).expand(3, 1, 4))
    theirs = of_transformers.output_of(layer(states, position_embeddings=tables))
    ours = of_transformers.run_without_attention(layer, states)
    assert torch.equal(ours, theirs), broken("of_transformers.run_without_attention", "its forward")


def test_dropped_layers_are_not_computed(vlm: Any) -> None:
    from copy import deepcopy

    text = deepcopy(vlm.language_model)
    inputs = {"inputs_embeds": draw(1, 4, text.config.hidden_size), "use_cache": False}
    states = text(**inputs, output_hidden_states=True).hidden_states
    of_transformers.keep_layers(text, 2)
    out = text(**inputs).last_hidden_state
    assert torch.equal(out, states[2]), broken("of_transformers.keep_layers", "its layers or norm")


def test_the_vision_tower_with_positions_of_ours(vlm: Any) -> None:
    tower = vlm.visual
    grid = torch.tensor([[1, 4, 8]])
    width = 3 * tower.config.temporal_patch_size * tower.config.patch_size**2
    patches = draw(32, width)
    out = tower(patches, grid_thw=grid)
    theirs = out if isinstance(out, torch.Tensor) else out.pooler_output
    ours = of_transformers.run_vision_tower(tower, patches, grid)
    assert torch.equal(ours, theirs), broken("of_transformers.run_vision_tower", "its positions")


def test_encoders_attend_as_decided_here() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from tests.toys import CLIP, T5

    for network, config, values in (
        (CLIPTextModel, CLIPTextConfig, CLIP), (T5EncoderModel, T5Config, T5),
    ):  # fmt: skip
        told = {**values, "attn_implementation": "flash_attention_2"}
        made = of_transformers.make_encoder(network, config, told)
        wanted = "sdpa" if getattr(network, "_supports_sdpa", False) else "eager"
        assert made.config._attn_implementation == wanted


def test_tensors_of_other_shapes_are_put_in_place() -> None:
    layer = on_meta(lambda: torch.nn.BatchNorm1d(4))
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        of_torch.put_tensor(layer, name, torch.zeros(0))
        assert getattr(layer, name).shape == (0,)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert not of_torch.is_watched(layer)
    watch = layer.register_forward_hook(lambda *_: None)
    assert of_torch.is_watched(layer)
    watch.remove()
    assert not of_torch.is_watched(layer)


def test_initializers_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.nn.init.normal_.__module__ == "torch.nn.init", broken("of_torch", "another module")
    with of_torch.WithoutInitialization():
        layer = torch.nn.Linear(3, 3)
        torch.nn.init.constant_(layer.weight, 5.0)
    assert not bool((layer.weight == 5).any()), broken("of_torch.WithoutInitialization", "")


def test_compiling_is_seen() -> None:
    seen: list[str] = []
    double = torch.compile(lambda x: x * 2, backend="eager")
    with of_torch.while_compiling(lambda *_: seen.append("start"), lambda *_: seen.append("end")):
        double(torch.ones(3))
    double(torch.ones(4, dtype=torch.float64))
    assert seen == ["start", "end"], broken("of_torch.while_compiling", str(seen))
    assert of_torch.compiled_folder()
