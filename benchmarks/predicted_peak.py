"""What plans predict against what runs take: peak memory, model by model and limit by limit.

    python benchmarks/real_size.py /var/tmp/flux24 --diffusers --blocks 2+4
    python benchmarks/real_size.py /var/tmp/deepgen --deepgen
    danqing convert /var/tmp/flux /var/tmp/flux8 --layout diffusers --dtype int8   # the whole one
    python benchmarks/predicted_peak.py --flux /var/tmp/flux24 --deepgen /var/tmp/deepgen \
        --int8 /var/tmp/flux8

Each run is a process of its own, of two steps, on the CPU; its peak is VmHWM, pages of mapped files
counted, the highest of its stages; where a streamed transformer stays between pictures, of two
pictures. The last line says how many are off by how much.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

GIB = 2**30
RUN = """
import json, sys
from danqing.engine import Engine
from danqing.options import Options
from danqing.request import Request
place, row = sys.argv[1], json.loads(sys.argv[2])
request, other = (
    Request(prompt=prompt, seed=1, height=row["size"][0], width=row["size"][1],
            num_inference_steps=row.get("steps", 2), num_images_per_prompt=row["batch"])
    for prompt in ("a boat", "a red house")
)
memory = row["memory"] and int(row["memory"] * 2**30)
options = Options(device="cpu", dtype=row["dtype"], memory=memory,
                  quantize=row.get("quantize", "off"), placement=row.get("placement", "auto"))
with Engine.open(place, options, planned_for=request, batch=row["batch"]) as engine:
    pictures = engine.generate(request, batch=row["batch"]).pictures
    plan = engine.plan
    if plan.placement == "streamed" and "transformer" in plan.kept:  # then the second takes more
        pictures += engine.generate(other, batch=row["batch"]).pictures
peak = max(cost.peak_bytes or 0 for picture in pictures for cost in picture.stages)
print(json.dumps({"predicted": plan.predicted_peak_bytes, "peak": peak, "tile": plan.tile,
                  "placement": plan.placement, "stages": plan.peak_bytes}))
"""
ROWS: list[dict[str, Any]] = [
    *({"model": "flux", "size": size, "batch": 1, "memory": None, "dtype": "bfloat16"}
      for size in ((256, 256), (512, 512), (768, 512), (1024, 1024))),
    *({"model": "flux", "size": (512, 512), "batch": 1, "memory": memory, "dtype": "bfloat16"}
      for memory in (2.5, 3, 4, 6, 10)),
    {"model": "flux", "size": (512, 512), "batch": 3, "memory": 8, "dtype": "bfloat16"},
    {"model": "flux", "size": (1024, 1024), "batch": 1, "memory": 3, "dtype": "bfloat16"},
    {"model": "flux", "size": (1024, 1024), "batch": 1, "memory": 6, "dtype": "bfloat16"},
    {"model": "flux", "size": (512, 512), "batch": 1, "memory": 8, "dtype": "bfloat16",
     "quantize": "int8"},
    {"model": "flux", "size": (256, 256), "batch": 1, "memory": 8, "dtype": "float32"},
    {"model": "flux", "size": (256, 256), "batch": 2, "memory": 12, "dtype": "float32"},
    *({"model": "deepgen", "size": size, "batch": 1, "memory": None, "dtype": "bfloat16"}
      for size in ((256, 256), (512, 512))),
    *({"model": "deepgen", "size": (512, 512), "batch": 1, "memory": memory, "dtype": "bfloat16"}
      for memory in (4, 6, 10)),
    {"model": "deepgen", "size": (256, 256), "batch": 2, "memory": 6, "dtype": "bfloat16"},
    {"model": "deepgen", "size": (256, 256), "batch": 1, "memory": 8, "dtype": "float32"},
    {"model": "pocket", "size": (512, 512), "batch": 1, "memory": None, "dtype": "bfloat16"},
    {"model": "pocket", "size": (1024, 1024), "batch": 1, "memory": None, "dtype": "float32"},
    *({"model": "int8", "size": (512, 512), "batch": 1, "memory": memory, "dtype": "bfloat16"}
      for memory in (4, 10)),
    *({"model": "int8", "size": (512, 512), "batch": 1, "memory": memory, "dtype": "bfloat16",
       "quantize": "int8"} for memory in (4, None)),
]  # fmt: skip


def run(place: str, row: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, place, json.dumps(row)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flux", help="folder of a FLUX.1 of real width")
    parser.add_argument("--int8", help="folder of a FLUX.1 of real size, converted to int8")
    parser.add_argument("--deepgen", help="folder of a DeepGen-1.0 of real size")
    parser.add_argument("--only", type=int, action="append", help="number of a row")
    options = parser.parse_args()
    places = {"flux": options.flux, "deepgen": options.deepgen, "pocket": "pocket"}
    places["int8"] = options.int8
    print("| | model | size | batch | limit | dtype | placement | predicted | measured | off |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    off = []
    for number, row in enumerate(ROWS):
        place = places[str(row["model"])]
        if place is None or (options.only and number not in options.only):
            continue
        found = run(place, row)
        size = "x".join(map(str, row["size"]))
        what = f"| {number} | {row['model']} | {size} | {row['batch']} | {row['memory'] or '-'} | "
        what += f"{row.get('quantize', '')} {row['dtype']} | "
        if "error" in found:
            print(f"{what}{found['error']} |")
            continue
        predicted, peak = found["predicted"], found["peak"]
        off.append(predicted / peak - 1)
        tile = f", tiles of {found['tile']}" if found["tile"] else ""
        print(
            f"{what}{found['placement']}{tile} | {predicted / GIB:.2f} | {peak / GIB:.2f} | "
            f"{100 * off[-1]:+.0f} % |",
            flush=True,
        )
    low = sum(one < -0.05 for one in off)  # noqa: PLR2004
    far = sum(abs(one) > 0.15 for one in off)  # noqa: PLR2004
    print(f"\n{len(off)} runs; {far} further off than 15 %, {low} more than 5 % too low")


if __name__ == "__main__":
    main()
