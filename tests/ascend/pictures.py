"""`python -m tests.ascend.pictures`: pictures through the real torch_npu over the stand-in CANN.

Prints one line of JSON: how far each is from the CPU's, and which kernels ran how often.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tests.ascend import standin

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}


def main(fused: str) -> None:
    library = standin.load()
    import torch

    torch.set_num_threads(1)
    from PIL import Image

    import danqing
    from danqing.verify.joints import compare_traces
    from danqing.verify.runs import record
    from tests import deepgen_toys, toys

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = Path(home)
        flux = toys.write_diffusers(folder / "flux")
        deepgen = deepgen_toys.write(folder / "deepgen")
        edit = {**SMALL, "image": Image.new("RGB", (96, 64), "teal")}
        for what, place, settings in (
            ("flux", flux, SMALL), ("deepgen", deepgen, SMALL), ("edit", deepgen, edit),
        ):  # fmt: skip
            for dtype in ("float32", "bfloat16"):
                for placement in ("resident", "staged"):
                    traces, kernels = [], {}
                    for device in ("npu:0", "cpu"):
                        before = standin.counts(library)
                        options: Any = (
                            {"fused": fused} if device != "cpu" and fused != "off" else {}
                        )
                        with danqing.open(
                            place, device=device, dtype=dtype, placement=placement, **options
                        ) as engine:
                            request = engine.spec.resolve(
                                danqing.Request(prompt="a red boat", **settings)
                            )
                            traces.append(record(engine, request, folder / f"{device}.trace"))
                        if device != "cpu":
                            after = standin.counts(library)
                            kernels = {
                                name: count - before.get(name, 0)
                                for name, count in after.items()
                                if count != before.get(name, 0)
                            }
                    comparison = compare_traces(*traces)
                    found[f"{what} {dtype} {placement}"] = {
                        "far": {
                            joint.name: joint.distance.relative if joint.distance else 0.0
                            for joint in comparison.joints
                        },
                        "kernels": kernels,
                    }
        texts = sorted({str(one.message)[:200] for one in said})
    print(json.dumps({"pictures": found, "warnings": texts}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "off")
