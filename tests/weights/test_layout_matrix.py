"""One toy FLUX.1 in every layout: it paints the picture of the diffusers folder it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import danqing
from danqing.errors import CheckpointError, UnknownModelError
from tests import layouts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SETTINGS: dict[str, Any] = {"seed": 1, "height": 64, "width": 64}


def paint(place: Path, components: Mapping[str, Path] | None = None) -> bytes:
    with danqing.open(place, device="cpu", dtype="float32", components=components) as engine:
        return engine.generate("a cat on the water", **SETTINGS).image.tobytes()


@pytest.fixture(scope="module")
def original(schnell: Path) -> bytes:
    return paint(schnell)


@pytest.fixture(scope="module")
def parts(schnell: Path) -> dict[str, layouts.State]:
    return layouts.states(schnell)


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Path]:
    return layouts.write_tokenizers(tmp_path / "small")


def write_parts(folder: Path, parts: Mapping[str, layouts.State]) -> Path:
    """Write the VAE and the encoders as the files ComfyUI's users have; return the folder."""
    layouts.save(folder / "ae.safetensors", parts["vae"])
    layouts.save(folder / "clip_l.safetensors", parts["text_encoder"])
    layouts.save(folder / "t5xxl_fp16.safetensors", parts["text_encoder_2"])
    return folder


@pytest.mark.parametrize("prefix", ["", layouts.COMFY, "diffusion_model."])
def test_files_side_by_side(
    parts: dict[str, layouts.State], small: dict[str, Path], tmp_path: Path, original: bytes,
    prefix: str,
) -> None:  # fmt: skip
    folder = write_parts(tmp_path / "files", parts)
    layouts.save(folder / "unet.safetensors", layouts.prefixed(prefix, parts["transformer"]))
    assert paint(folder, small) == original
    assert paint(folder / "unet.safetensors", small) == original


def test_one_file_of_diffusers_names(
    schnell: Path, parts: dict[str, layouts.State], small: dict[str, Path], tmp_path: Path,
    original: bytes,
) -> None:  # fmt: skip
    folder = write_parts(tmp_path / "files", parts)
    source = next((schnell / "transformer").glob("*.safetensors"))
    (folder / "flux.safetensors").write_bytes(source.read_bytes())
    assert paint(folder, small) == original


def test_all_in_one(
    parts: dict[str, layouts.State], small: dict[str, Path], tmp_path: Path, original: bytes
) -> None:
    file = layouts.save(tmp_path / "all.safetensors", layouts.all_in_one(parts))
    assert danqing.models.open_checkpoint(file, small).layout == "ComfyUI all-in-one file"
    assert paint(file, small) == original


def test_components_from_different_places(
    schnell: Path, parts: dict[str, layouts.State], tmp_path: Path, original: bytes
) -> None:
    vae = layouts.save(tmp_path / "a" / "vae.safetensors", parts["vae"])
    clip = layouts.save(tmp_path / "b" / "x.safetensors", parts["text_encoder"])
    t5 = layouts.save(tmp_path / "c" / "y.safetensors", parts["text_encoder_2"])
    unet = layouts.save(tmp_path / "d" / "z.safetensors", parts["transformer"])
    places = {"vae": vae, "clip": clip, "t5": t5, "transformer": unet}
    assert paint(schnell, places) == original


@pytest.mark.parametrize("spelling", ["plain", ".scale_weight", ".weight_scale", "by row"])
def test_fp8_is_what_its_values_and_scales_say(
    parts: dict[str, layouts.State], small: dict[str, Path], tmp_path: Path, original: bytes,
    spelling: str,
) -> None:  # fmt: skip
    def reduced(state: layouts.State) -> layouts.State:
        if spelling == "plain":
            return layouts.fp8_plain(state)
        if spelling == "by row":
            return layouts.fp8_scaled(state, ".weight_scale", by_row=True)
        return layouts.fp8_scaled(state, spelling)

    less = {**parts, **{name: reduced(parts[name]) for name in ("transformer", "text_encoder_2")}}
    folder = write_parts(tmp_path / "fp8", less)
    layouts.save(folder / "flux.safetensors", less["transformer"])
    by_hand = write_parts(
        tmp_path / "by hand",
        {name: layouts.widened(state) for name, state in less.items()},
    )
    layouts.save(by_hand / "flux.safetensors", layouts.widened(less["transformer"]))
    picture = paint(folder, small)
    assert picture == paint(by_hand, small)
    assert picture != original


def test_fp8_all_in_one(
    parts: dict[str, layouts.State], small: dict[str, Path], tmp_path: Path
) -> None:
    less = {**parts, "transformer": layouts.fp8_scaled(parts["transformer"], ".scale_weight")}
    file = layouts.save(tmp_path / "all.safetensors", layouts.all_in_one(less))
    wide = {**parts, "transformer": layouts.widened(less["transformer"])}
    by_hand = layouts.save(tmp_path / "hand" / "all.safetensors", layouts.all_in_one(wide))
    assert paint(file, small) == paint(by_hand, small)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf(
    parts: dict[str, layouts.State], small: dict[str, Path], tmp_path: Path, original: bytes,
    kind: str,
) -> None:  # fmt: skip
    """The picture is that of the weights as the library gguf's own reader gives them."""
    folder = write_parts(tmp_path / "gguf", parts)
    wide = layouts.write_gguf(folder / "flux.gguf", "flux", parts["transformer"], kind)
    by_hand = write_parts(tmp_path / "by hand", parts)
    layouts.save(by_hand / "flux.safetensors", wide)
    picture = paint(folder, small)
    assert danqing.models.open_checkpoint(folder, small).layout == "GGUF files"
    assert picture == paint(by_hand, small)
    assert (picture == original) == (kind == "F32")


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "F16"])
def test_gguf_text_encoder(
    schnell: Path, parts: dict[str, layouts.State], tmp_path: Path, kind: str
) -> None:
    """T5 under the names of llama.cpp, whose vocabulary comes from the folder."""
    state = layouts.llama_t5(parts["text_encoder_2"])
    wide = layouts.write_gguf(tmp_path / "t5.gguf", "t5encoder", state, kind)
    back = {
        name: wide[next(iter(layouts.llama_t5({name: tensor})))]
        for name, tensor in parts["text_encoder_2"].items()
    }
    by_hand = layouts.save(tmp_path / "t5.safetensors", back)
    assert paint(schnell, {"t5": tmp_path / "t5.gguf"}) == paint(schnell, {"t5": by_hand})


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf_k_quants(tmp_path: Path, kind: str) -> None:
    """Rows of 256 and more, cut into q, k and v, are widened block by block."""
    from danqing.weights.gguf_file import GgufFile

    state = {"a.weight": torch.randn(24, 512), "b.weight": torch.randn(24, 100)}
    wide = layouts.write_gguf(tmp_path / "k.gguf", "flux", state, kind)
    file = GgufFile(tmp_path / "k.gguf")
    for name, entry in file.entries.items():
        assert entry.dtype == (kind if name == "a.weight" else "F32")
        assert torch.equal(file.read(entry), wide[name])
        assert torch.equal(file.read(entry, 8, 16), wide[name][8:16])
    assert wide["a.weight"].isfinite().all()


@pytest.mark.parametrize(
    ("ending", "what"),
    [(".quant_map", "bitsandbytes"), (".qweight", "nunchaku"), (".weight_scale_2", "NVFP4")],
)
def test_foreign_quantisation_is_named(
    parts: dict[str, layouts.State], tmp_path: Path, ending: str, what: str
) -> None:
    state = {**parts["transformer"], f"double_blocks.0.img_mlp.0{ending}": torch.zeros(4)}
    file = layouts.save(tmp_path / "odd.safetensors", state)
    with pytest.raises(UnknownModelError, match=what):
        danqing.open(file, device="cpu")


def test_the_message_names_the_small_files(parts: dict[str, layouts.State], tmp_path: Path) -> None:
    file = layouts.save(tmp_path / "all.safetensors", layouts.all_in_one(parts))
    with pytest.raises(CheckpointError) as caught:
        danqing.open(file, device="cpu")
    assert "vocab.json" in str(caught.value)
    assert "--component" in str(caught.value)


def test_toys_agree_with_their_own_gguf(tmp_path: Path) -> None:
    """The writer above is the library's: its own reader finds the same names and shapes."""
    state = {"x.weight": torch.arange(12.0).reshape(3, 4)}
    assert torch.equal(
        layouts.write_gguf(tmp_path / "x.gguf", "flux", state, "F32")["x.weight"], state["x.weight"]
    )
