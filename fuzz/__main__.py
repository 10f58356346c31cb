"""python -m fuzz: run the fuzz targets."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from fuzz.engine import fuzz, run_atheris, run_case
from fuzz.targets import TARGETS, write_corpus


def main() -> int:
    """Fuzz for as long as is said; return 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="in all, over the targets")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--engine", choices=("own", "atheris"), default="own")
    parser.add_argument("--input", type=Path, help="run this one input")
    parser.add_argument("--write-corpus", action="store_true", help="write the first inputs")
    asked = parser.parse_args()
    targets = [TARGETS[name] for name in asked.target or TARGETS]
    if asked.write_corpus:
        write_corpus()
        return 0
    if asked.input is not None:
        with tempfile.TemporaryDirectory() as folder:
            for target in targets:
                run_case(target, asked.input.read_bytes(), Path(folder))
        return 0
    if asked.engine == "atheris":
        run_atheris(targets[0], seconds=int(asked.seconds), seed=asked.seed)
    failed = False
    for target in targets:
        result = fuzz(target, seconds=asked.seconds / len(targets), seed=asked.seed)
        print(f"{target.name:<14}{result.cases:>9} cases{len(result.findings):>4} findings")
        for why, place in result.findings:
            failed = True
            print(f"  {why}: {place}")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
