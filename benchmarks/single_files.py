"""The same files, opened by danqing and by diffusers: who opens what, and is it right?

A FLUX.1 transformer of real width (3072) with one block of each kind, as diffusers' converter wants
it; random weights; every tensor of what was opened is compared with what the file says.

    python benchmarks/single_files.py
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": False, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
CLOSE = 1e-2
"""Relative to a tensor's largest value: the bfloat16 that both are opened in, rounded twice."""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text(
            json.dumps({"_class_name": "FluxTransformer2DModel", **CONFIG})
        )
        print("| file | danqing | diffusers, `config=` given |\n|---|---|---|")
        for words, path, wanted in files(folder):
            cells = [verdict(lambda: open_it(path, folder), wanted) for open_it in OPENERS]  # noqa: B023
            print(f"| {words} | {cells[0]} | {cells[1]} |", flush=True)
            path.unlink()


def files(folder: Path) -> Iterator[tuple[str, Path, dict[str, torch.Tensor]]]:
    """Yield each kind of file, and the tensors it stands for under the names of the release."""
    from diffusers import FluxTransformer2DModel

    from tests import layouts, toys

    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        module = FluxTransformer2DModel(**CONFIG).to(torch.bfloat16)
    own = dict(module.state_dict())
    state = toys.bfl_transformer(own)
    del module
    place = folder / "file.safetensors"
    yield "BFL, bfloat16", layouts.save(place, state), state
    prefixed = layouts.prefixed(layouts.COMFY, state)
    yield "ComfyUI, `model.diffusion_model.`", layouts.save(place, prefixed), state
    yield "diffusers' names in one file", layouts.save(place, own), state
    narrow = layouts.fp8_plain(state)
    yield "fp8, plain", layouts.save(place, narrow), layouts.widened(narrow)
    for spelling in (".scale_weight", ".weight_scale"):
        scaled = layouts.fp8_scaled(state, spelling)
        yield f"fp8, `{spelling}`", layouts.save(place, scaled), layouts.widened(scaled)
    for kind in ("Q8_0", "Q4_0"):
        path = folder / "file.gguf"
        yield f"GGUF {kind}", path, layouts.write_gguf(path, "flux", state, kind)


def by_danqing(path: Path, _: Path) -> dict[str, torch.Tensor]:
    from danqing import models

    checkpoint = models.open_checkpoint(path)
    model = models.make_model(checkpoint, models.identify(checkpoint))
    module = model.build(
        "transformer", dtype="bfloat16", device=torch.device("cpu"), on_bytes=lambda _: None
    )
    return dict(module.state_dict())


def by_diffusers(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    more = {}
    if path.suffix == ".gguf":
        more["quantization_config"] = GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    module = FluxTransformer2DModel.from_single_file(
        str(path), config=str(folder), subfolder="transformer", torch_dtype=torch.bfloat16,
        local_files_only=True, **more,
    )  # fmt: skip
    return {
        name: dequantize_gguf_tensor(tensor) if isinstance(tensor, GGUFParameter) else tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


OPENERS: tuple[Callable[[Path, Path], dict[str, torch.Tensor]], ...] = (by_danqing, by_diffusers)


def verdict(open_it: Callable[[], dict[str, torch.Tensor]], wanted: dict[str, torch.Tensor]) -> str:
    """Say whether it was opened, and whether the tensors are the file's."""
    from tests import toys

    try:
        found = toys.bfl_transformer({name: t.detach().float() for name, t in open_it().items()})
    except Exception as error:  # noqa: BLE001 - whatever a library raises is its answer
        first = (str(error).splitlines() or [""])[0]
        return f"refuses: {type(error).__name__}: {first[:90]}"
    finally:
        gc.collect()
    worst, where = 0.0, ""
    for name, tensor in wanted.items():
        if not name.endswith((".weight", ".bias", ".scale")):
            continue
        away = float((found[name] - tensor.float()).abs().max() / tensor.float().abs().max())
        if away > worst:
            worst, where = away, name
    if worst < CLOSE:
        return "opens, right"
    return f"opens, **WRONG**: {where} off by {worst:.0%} of its largest value"


if __name__ == "__main__":
    main()
