"""One step of a FLUX.1 transformer of real width: danqing and its peers, alternating.

    python benchmarks/real_size.py /var/tmp/flux24 --diffusers --blocks 2+4
    python benchmarks/step.py /var/tmp/flux24 [--size 512] [--turns 5] [--only NAME ...]

Each contender is a process of its own, loaded once, that computes the same step of the same inputs
when its turn comes; danqing as in a run, where the layers that modulate the blocks have run before
the first step. Errors are of the velocity, relative to that of diffusers in float32. Peers that are
not installed are left out: `pip install openvino torchao`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CONTENDERS = (
    "diffusers", "danqing", "danqing --compile inductor", "danqing int8", "torchao int8",
    "openvino",
)  # fmt: skip
REFERENCE = "reference"
VELOCITY = "velocity"


def inputs(size: int, dtype: Any) -> dict[str, Any]:
    """Return what a step of a square picture of this size takes, the same each time."""
    import torch

    side, generator = size // 16, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    places = torch.zeros(side, side, 3)
    places[..., 1] += torch.arange(side)[:, None]
    places[..., 2] += torch.arange(side)[None, :]
    return {
        "hidden_states": draw(1, side * side, 64),
        "encoder_hidden_states": draw(1, 256, 4096),
        "pooled_projections": draw(1, 768),
        "timestep": torch.tensor([0.5]).to(dtype),  # exact in bfloat16, also times 1000
        "img_ids": places.reshape(-1, 3),
        "txt_ids": torch.zeros(256, 3),
    }


def of_diffusers(folder: Path, dtype: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype, local_files_only=True
    ).eval()


def step_of_diffusers(folder: Path, size: int, dtype: str = "bfloat16") -> Callable[[], Any]:
    import torch

    kind = getattr(torch, dtype)
    network, given = of_diffusers(folder, kind), inputs(size, kind)
    return lambda: network(**given, return_dict=False)[0]


def step_of_torchao(folder: Path, size: int) -> Callable[[], Any]:
    import torch

    torchao: Any = import_module("torchao.quantization")
    network, given = of_diffusers(folder, torch.bfloat16), inputs(size, torch.bfloat16)
    torchao.quantize_(network.transformer_blocks, torchao.Int8DynamicActivationInt8WeightConfig())
    torchao.quantize_(
        network.single_transformer_blocks, torchao.Int8DynamicActivationInt8WeightConfig()
    )
    return lambda: network(**given, return_dict=False)[0]


def step_of_openvino(folder: Path, size: int) -> Callable[[], Any]:
    import torch

    openvino: Any = import_module("openvino")

    given = inputs(size, torch.float32)
    network = of_diffusers(folder, torch.float32)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            named = dict(zip(given, tensors, strict=True))
            found: torch.Tensor = self.network(**named, return_dict=False)[0]
            return found

    with torch.no_grad():
        model = openvino.convert_model(Positional(), example_input=tuple(given.values()))
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    arrays = [tensor.numpy() for tensor in given.values()]
    return lambda: torch.from_numpy(compiled(arrays)[0])


def step_of_danqing(
    folder: Path, size: int, *, int8: bool = False, compiler: str = "off"
) -> Callable[[], Any]:
    import torch

    from danqing.engine import Engine
    from danqing.networks.hoisting import Hoisted, hoisted
    from danqing.networks.of_diffusers import modulations
    from danqing.options import Options
    from danqing.request import Request

    request = Request(prompt="a", height=size, width=size, num_inference_steps=100)
    engine = Engine.open(
        folder,
        Options(
            device="cpu", dtype="bfloat16", quantize="int8" if int8 else "off", compile=compiler
        ),
        planned_for=request,
    )
    given = inputs(size, torch.bfloat16)
    network = engine._residence.load(["transformer"], [], None)["transformer"]
    network.pos_embed.prepare(torch.cat([given["txt_ids"], given["img_ids"]]), torch.device("cpu"))

    kept = Hoisted()

    def embed(_: int) -> torch.Tensor:
        found: torch.Tensor = network.time_text_embed(
            given["timestep"] * 1000, given["pooled_projections"]
        )
        return found

    def step() -> Any:
        with engine._clock.kernels(), engine.device.repeating(), torch.inference_mode():
            once = hoisted(
                network,
                embed,
                embedder="time_text_embed",
                layers=modulations(network),
                steps=1,
                kept=kept,
            )
            with once as at:
                at(0)
                return network(**given, return_dict=False)[0]

    return step


STEPS: dict[str, Callable[[Path, int], Callable[[], Any]]] = {
    REFERENCE: lambda folder, size: step_of_diffusers(folder, size, "float32"),
    "diffusers": step_of_diffusers,
    "danqing": step_of_danqing,
    "danqing --compile inductor": lambda folder, size: step_of_danqing(
        folder, size, compiler="inductor"
    ),
    "danqing int8": lambda folder, size: step_of_danqing(folder, size, int8=True),
    "torchao int8": step_of_torchao,
    "openvino": step_of_openvino,
}


def work(name: str, folder: Path, size: int, out: Path) -> None:
    """Load, save what a step gives, and then time a step for each line that comes in."""
    import torch
    from safetensors.torch import save_file

    step = STEPS[name](folder, size)
    with torch.no_grad():
        save_file({VELOCITY: step().float().contiguous()}, out)
        print("ready", flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            step()
            print(time.perf_counter() - start, flush=True)


def start(name: str, options: argparse.Namespace, out: Path) -> subprocess.Popen[str] | None:
    command = [sys.executable, __file__, str(options.folder), "--size", str(options.size)]
    child = subprocess.Popen(
        [*command, "--work", name, str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout
    if child.stdout.readline().strip() == "ready":
        return child
    _, errors = child.communicate()
    print(f"{name}: left out: {(errors.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", action="append", choices=CONTENDERS)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], options.folder, options.size, Path(options.work[1]))
        return
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        truth = start(REFERENCE, options, Path(scratch) / REFERENCE)
        assert truth
        truth.communicate()
        chosen = options.only or CONTENDERS
        started = {name: start(name, options, Path(scratch) / name) for name in chosen}
        running = {name: child for name, child in started.items() if child}
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for turn in range(options.turns):
            order = list(running) if turn % 2 else list(reversed(running))
            for name in order:
                child = running[name]
                assert child.stdin
                assert child.stdout
                child.stdin.write("go\n")
                child.stdin.flush()
                seconds[name].append(float(child.stdout.readline()))
        for child in running.values():
            child.communicate()
        wanted = load_file(Path(scratch) / REFERENCE)[VELOCITY]
        errors = {
            name: float((load_file(Path(scratch) / name)[VELOCITY] - wanted).norm() / wanted.norm())
            for name in running
        }
    first = statistics.median(seconds[next(iter(seconds))])
    print(f"| | seconds | of {next(iter(seconds))} | error |\n|---|---|---|---|")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.2f} | {middle / first:.2f} | {errors[name]:.1e} |")
    print(json.dumps(seconds), file=sys.stderr)


if __name__ == "__main__":
    main()
