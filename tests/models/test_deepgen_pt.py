"""DeepGen's original .pt: adapters merged as peft merges them, and no other pickle is opened."""

from __future__ import annotations

import json
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import danqing
from danqing.errors import CheckpointError, UnsafeFileError
from tests import deepgen_toys as toys
from tests.conftest import call_danqing

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}


def bases(folder: Path, source: Path) -> dict[str, str | Path]:
    return {"vlm": folder / "qwen", "vae": source / "vae", "scheduler": source / "scheduler"}


@pytest.mark.parametrize(
    ("names", "outer"),
    [
        ("new", ""),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("old", ""), ("new", "module."), ("old", "model.module."))
        ),
    ],
)
def test_adapters_are_merged_as_peft_merges_them(
    deepgen: Path, tmp_path: Path, names: str, outer: str
) -> None:
    expected = toys.write_pt(tmp_path, deepgen, names=names, outer=outer)
    parts = bases(tmp_path, deepgen)
    with danqing.open(
        tmp_path / "model.pt", device="cpu", components=parts, allow_pt=True
    ) as engine:
        picture = engine.generate("a cat", **SMALL)
        assert any("adapters of the .pt are merged" in text for text in engine.plan.assumptions)
    arguments = [
        word for name, place in parts.items() for word in ("--component", f"{name}={place}")
    ]
    target = tmp_path / "folder"
    done = call_danqing("convert", tmp_path / "model.pt", target, "--allow-pt", *arguments)
    assert done.returncode == 0, done.stderr
    written = load_file(target / "vlm" / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(written[name], tensor, atol=1e-6), name
    with danqing.open(target, device="cpu") as engine:
        assert engine.generate("a cat", **SMALL).image.tobytes() == picture.image.tobytes()
    stock = load_file(tmp_path / "qwen" / "model.safetensors")
    changed = [name for name in stock if not torch.equal(stock[name], written[name])]
    assert len(changed) == sum("lora_" in n for n in torch.load(tmp_path / "model.pt")) // 2 - 1


def test_adapted_blocks_are_streamed(deepgen: Path, tmp_path: Path) -> None:
    toys.write_pt(tmp_path, deepgen)
    parts = bases(tmp_path, deepgen)
    found, units = [], []
    for placement in ("resident", "streamed"):
        with danqing.open(
            tmp_path / "model.pt", device="cpu", components=parts, allow_pt=True,
            placement=placement,
        ) as engine:  # fmt: skip
            found.append(engine.generate("a cat", **SMALL).image.tobytes())
            units.append([unit.name for unit, _ in engine._model.units("vlm")])
    with danqing.open(deepgen, device="cpu") as engine:
        plain = [unit.name for unit, _ in engine._model.units("vlm")]
    assert found[0] == found[1]
    assert units[0] == units[1] == plain


def test_the_language_model_is_written_in_its_own_dtype(deepgen: Path, tmp_path: Path) -> None:
    toys.write_pt(tmp_path, deepgen)
    place = tmp_path / "qwen" / "model.safetensors"
    from safetensors.torch import save_file

    save_file({n: t.bfloat16() for n, t in load_file(place).items()}, place)
    with danqing.open(
        tmp_path / "model.pt", components=bases(tmp_path, deepgen), allow_pt=True, device="cpu"
    ) as engine:
        component = engine.checkpoint.component("vlm")
        name = "model.layers.0.self_attn.q_proj.weight"
        adapter = component.adapters[name]
        low, high = (adapter.file.read(entry).float() for entry in (adapter.low, adapter.high))
        base = load_file(place)[name]
        assert torch.equal(component.read(name), (base.float() + 2 * (high @ low)).bfloat16())
        assert torch.equal(component.read(name, 3, 9), component.read(name)[3:9])


def test_stock_qwen_is_refused_without_adapters(deepgen: Path, tmp_path: Path) -> None:
    toys.write_pt(tmp_path, deepgen, adapters=False)
    for path, allow in ((deepgen, False), (tmp_path / "model.pt", True)):
        with pytest.raises(CheckpointError, match="stock Qwen") as caught:
            danqing.open(path, components=bases(tmp_path, deepgen), allow_pt=allow, device="cpu")
        assert "4.41.2" in str(caught.value)


def test_a_pickle_is_opened_only_when_that_is_said(deepgen: Path, tmp_path: Path) -> None:
    toys.write_pt(tmp_path, deepgen)
    with pytest.raises(UnsafeFileError, match="pickle") as caught:
        danqing.open(tmp_path / "model.pt", components=bases(tmp_path, deepgen), device="cpu")
    assert "--allow-pt" in str(caught.value)
    done = call_danqing("generate", "a", "-m", tmp_path / "model.pt", "-o", tmp_path / "a.png")
    assert done.returncode == 3


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return open, (str(self.place), "w")


LAYER = "lmm.model.language_model.layers.99.mlp.up_proj.lora_{}.default.weight"
TABLES: dict[str, Any] = {
    "no tensors": lambda _: {"a": 1},
    "other model": lambda _: {"weight": torch.ones(3)},
    "one half": lambda state: drop(state, next(n for n in state if "q_proj.lora_B" in n)),
    "odd tensor": lambda state: {**state, "surprise": torch.ones(3)},
    "odd part of the language model": lambda state: {**state, "lmm.model.norm.x": torch.ones(3)},
    "wrong shape": lambda state: {
        **state, next(n for n in state if "q_proj.lora_B" in n): torch.ones(7, 4)
    },
    "missing tensor": lambda state: drop(state, "transformer.proj_out.bias"),
    "adapter of nothing": lambda state: {
        **state, **{LAYER.format(half): torch.ones(4, 4) for half in "AB"}
    },
}  # fmt: skip


def drop(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in state.items() if key != name}


def no_language_model(folder: Path) -> None:
    shutil.rmtree(folder / "qwen")
    (folder / "qwen").mkdir()


def a_folder(folder: Path) -> None:
    (folder / "model.pt").unlink()
    (folder / "model.pt").mkdir()


FILES: dict[str, Any] = {
    "code": lambda f: torch.save({"meta_queries": Evil(f / "it-ran")}, f / "model.pt"),
    "plain pickle": lambda f: (f / "model.pt").write_bytes(pickle.dumps({"meta_queries": 1})),
    "cut": lambda f: (f / "model.pt").write_bytes((f / "model.pt").read_bytes()[:5000]),
    "empty": lambda f: (f / "model.pt").write_bytes(b""),
    "no vlm": no_language_model,
    "a folder": a_folder,
}


@pytest.mark.parametrize("kind", [*TABLES, *FILES])
def test_what_can_be_wrong_with_it(deepgen: Path, tmp_path: Path, kind: str) -> None:
    toys.write_pt(tmp_path, deepgen)
    place = tmp_path / "model.pt"
    if kind in TABLES:
        torch.save(TABLES[kind](torch.load(place)), place)
    else:
        FILES[kind](tmp_path)
    with pytest.raises(danqing.errors.DanqingError) as caught:
        danqing.open(
            tmp_path / "model.pt", components=bases(tmp_path, deepgen), allow_pt=True, device="cpu"
        )
    assert caught.value.exit_code in (2, 3)
    assert caught.value.seen
    assert not (tmp_path / "it-ran").exists()


def test_tensors_under_a_wrapper_are_found(deepgen: Path, tmp_path: Path) -> None:
    toys.write_pt(tmp_path, deepgen)
    place = tmp_path / "model.pt"
    torch.save({"state_dict": torch.load(place), "epoch": 3}, place)
    with danqing.open(
        place, components=bases(tmp_path, deepgen), allow_pt=True, device="cpu"
    ) as engine:
        assert json.dumps(engine.plan.as_dict())
        assert engine.checkpoint.fingerprint
