"""What every device must do, run on one of them: `python -m tests.devices.contract ROW`.

A row is `cpu`, or a chip to simulate. Prints what was found as one line of JSON. It is a program,
because a process has one simulated device, or none.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from danqing.devices import import_torch

torch = import_torch()


def main(row: str) -> None:
    name = "cpu"
    if row != "cpu":
        from danqing.devices.simulated import install

        install(row, devices=2)
        name = "npu:0"
    found = {"row": row, **look(name)}
    torch.set_num_threads(1)
    found["pictures"] = pictures(name)
    print(json.dumps(found))


def look(name: str) -> dict[str, Any]:
    """Try each method of the device."""
    from danqing import devices

    selection = devices.select(name)
    device = selection.device
    device.prepare()
    memory = device.memory()
    assert memory is not None
    device.reset_peak()
    before = device.peak_bytes()
    held = torch.ones(8 * 2**20, device=device.torch_device)
    device.synchronize()
    after = device.peak_bytes()
    assert before is not None
    assert after is not None
    del held
    device.release()
    try:
        torch.empty(2**46, device=device.torch_device)
        recognised = False
    except (RuntimeError, MemoryError) as error:
        recognised = device.is_out_of_memory(error)
    inside = []
    with device.deterministic(True):
        inside.append(torch.are_deterministic_algorithms_enabled())
    inside.append(torch.are_deterministic_algorithms_enabled())
    return {
        "name": device.name,
        "chip": device.chip,
        "driver": device.driver,
        "reason": selection.reason,
        "memory": [memory.free_bytes, memory.total_bytes],
        "grown": after - before,
        "dtypes": {one: device.computes(one) for one in ("float32", "bfloat16", "float16")},
        "peaks": {one: device.peak_flops(one) for one in ("float32", "bfloat16", "float16")},
        "out_of_memory": recognised,
        "other_error": device.is_out_of_memory(RuntimeError("shapes do not match")),
        "deterministic": inside,
        "noise": float(torch.randn(3, generator=torch.Generator().manual_seed(1)).sum()),
    }


def traced(
    place: Any, settings: dict[str, Any], at: Path, *, device: str, dtype: str, placement: str
) -> Any:
    """Return the trace of a picture."""
    import danqing
    from danqing.verify.runs import record

    with danqing.open(place, device=device, dtype=dtype, placement=placement) as engine:
        request = engine.spec.resolve(danqing.Request(prompt="a red boat", **settings))
        return record(engine, request, at)


def pictures(name: str) -> dict[str, Any]:
    """Paint FLUX.1 and DeepGen-1.0 toys and the pocket model here and on the CPU; compare all bits."""
    from danqing.errors import DeviceError
    from danqing.verify.joints import compare_traces
    from tests import deepgen_toys, toys

    small: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        flux = toys.write_diffusers(folder / "flux")
        deepgen = deepgen_toys.write(folder / "deepgen")
        edit = {**small, "image": Image.new("RGB", (96, 64), "teal")}
        for what, place, settings in (
            ("pocket", "pocket", {"seed": 3}), ("flux", flux, small), ("deepgen", deepgen, small),
            ("edit", deepgen, edit),
        ):  # fmt: skip
            for dtype in ("float32", "bfloat16", "float16"):
                wanted = None  # the CPU's, made once: placements there are compared elsewhere
                for placement in ("resident", "staged", "streamed"):
                    key = f"{what} {dtype} {placement}"
                    try:
                        seen = traced(
                            place,
                            settings,
                            folder / "seen",
                            device=name,
                            dtype=dtype,
                            placement=placement,
                        )
                    except DeviceError as error:
                        found[key] = error.what
                        break
                    wanted = wanted or traced(
                        place,
                        settings,
                        folder / "wanted",
                        device="cpu",
                        dtype=dtype,
                        placement="resident",
                    )
                    found[key] = compare_traces(seen, wanted).identical
    return found


if __name__ == "__main__":
    main(sys.argv[1])
