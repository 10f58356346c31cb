"""Make the pocket model from nothing: `python -m training`.

Every stage leaves its state in the folder, so that a run that was interrupted goes on where it was
when the same command is given again; a stage that is finished is only read.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = Path(__file__).parents[1] / "src" / "danqing" / "pocket"
CHUNKS = 70
DECODER_CHUNKS = 20
SAMPLES_EVERY = 500
STEPS = {"text": 1000, "autoencoder": 6900, "flow": 13600, "straight": 180}
"""Of each stage, at full length, from nothing."""
STEPS_ON = {"autoencoder": 4000, "flow": 8100, "straight": 180}
"""Of each stage, from a finished checkpoint."""


def main() -> None:
    """Run the stages, one after the other."""
    given = _arguments()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    lengths = STEPS_ON if given.start else STEPS
    steps = {name: max(2, round(count * given.share)) for name, count in lengths.items()}
    chunks = max(1, round(CHUNKS * given.share))
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        found = work()
        seconds[name] = round(time.monotonic() - started, 1)
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
        return found

    from training import (
        autoencoder,
        code,
        dataset,
        export,
        flow,
        plot,
        samples,
        start,
        straighten,
        text,
    )

    seed = given.seed
    timed(
        "pictures",
        lambda: dataset.render(
            folder / "pictures",
            seed=seed,
            count=chunks * dataset.CHUNK,
            processes=os.cpu_count() or 1,
        ),
    )
    the_code = timed("code", lambda: code.fit(folder))
    readers = timed(
        "text",
        lambda: (
            start.readers(given.start, folder)
            if given.start
            else text.train(folder, steps=steps["text"], seed=seed)
        ),
    )
    vae = timed(
        "autoencoder",
        lambda: autoencoder.train(
            folder,
            the_code,
            steps=steps["autoencoder"],
            seed=seed,
            chunks=min(chunks, DECODER_CHUNKS),
            begin=start.autoencoder(given.start) if given.start else None,
        ),
    )
    material = timed("material", lambda: flow.gather(folder, seed=seed, chunks=chunks))
    teacher = timed(
        "flow",
        lambda: flow.train(
            folder,
            readers,
            material,
            steps=steps["flow"],
            seed=seed,
            begin=start.transformer(given.start) if given.start else None,
            show=samples.watcher(folder, readers, the_code, material),
            every=SAMPLES_EVERY,
        ),
    )
    transformer = timed(
        "straight",
        lambda: straighten.train(
            folder, readers, material, teacher, steps=steps["straight"], seed=seed
        ),
    )
    target = folder / "checkpoint" if given.share < 1 else PACKAGE / "checkpoint"
    export.export(
        folder, target, readers=readers, vae=vae, transformer=transformer,
        shift=material.shift, scale=material.scale,
    )  # fmt: skip
    plot.losses(folder, folder / "losses.png")
    (folder / "seconds.json").write_text(json.dumps(seconds, indent=1) + "\n", "utf-8")
    if given.share >= 1:
        from training import card, evaluate, references

        timed("references", lambda: references.write(PACKAGE / "references"))
        timed("figures", lambda: evaluate.report(folder))
        card.write(target, folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("training/run"),
        help="where states, logs and data are kept",
    )
    parser.add_argument(
        "--share", type=float, default=1.0,
        help="share of the steps and pictures; below 1 nothing in the package is replaced",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--start",
        type=Path,
        metavar="CHECKPOINT",
        help="go on from a finished checkpoint instead of from nothing",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
