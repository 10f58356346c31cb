"""Count what the structure of the sources costs: options carried by hand, parameters, long files.

    python benchmarks/structure.py [CHECKOUT ...]

Prints one column for each checkout (default: this one), so that two commits can be compared:
`git worktree add /tmp/before COMMIT; python benchmarks/structure.py /tmp/before .`
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

OPTIONS = {
    "device", "devices", "dtype", "placement", "memory", "tile", "quantise", "quantize",
    "attention", "deterministic", "compile", "compile_with", "fused", "place", "component",
    "components", "allow_pt", "prompt_cache",
}  # fmt: skip
"""How to run: the fields of `Options`, under every name they have had."""
COMPONENTS = {
    "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer_2",
    "tokenizer_3", "scheduler", "vlm", "unet",
}  # fmt: skip
"""Components of families; `tokenizer` and `connector` are names of roles, too."""
CARRIERS = ("cli", "evalsets", "report", "serve", "verify", "engine", "engine.py", "plan",
            "plan.py", "__init__.py")  # fmt: skip
"""Rooms in which a parameter of such a name is an option, and not a tensor's device or dtype."""
LONG_FILE = 500


def main() -> None:
    """Print the table."""
    checkouts = [Path(name) for name in sys.argv[1:]] or [Path()]
    columns = [_counts(checkout / "src" / "danqing") for checkout in checkouts]
    for name in columns[0]:
        print(f"{name:<52}" + "".join(f"{column[name]:>28}" for column in columns))


def _counts(source: Path) -> dict[str, str]:
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(source.rglob("*.py"))}
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in trees}
    parameters = sorted(
        (_parameters(node), node.name)
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    classes = max(
        ((node.end_lineno or 0) - node.lineno + 1, node.name)
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    families = source / "models"
    return {
        "lines that only carry an option": str(_carrying(source, trees)),
        "parameters, 99th percentile": str(parameters[len(parameters) * 99 // 100][0]),
        "parameters, largest": f"{parameters[-1][0]} ({parameters[-1][1]})",
        "component names outside families and kinds": str(_literals(source, trees)),
        "longest class, lines": f"{classes[0]} ({classes[1]})",
        f"files over {LONG_FILE} lines": str(sum(n > LONG_FILE for n in lines.values())),
        "files": str(len(lines)),
        "lines of src/danqing": str(sum(lines.values())),
        "lines of FLUX.1": str(_lines_under(families / "flux", lines)),
        "lines of DeepGen-1.0": str(_lines_under(families / "deepgen", lines)),
        "lines of SD3.5": str(_lines_under(families / "sd3", lines)),
    }


def _lines_under(place: Path, lines: dict[Path, int]) -> int:
    """Lines of a family: of its package, or of its one module."""
    return sum(
        n for path, n in lines.items() if place in path.parents or path.with_suffix("") == place
    )


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count named parameters, self and cls aside."""
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(parameter.arg not in ("self", "cls") for parameter in named)


def _carrying(source: Path, trees: dict[Path, ast.Module]) -> int:
    """Count lines that declare an option as a parameter or field, or pass it on unchanged."""
    return sum(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path, tree in trees.items()
        if path.relative_to(source).parts[0] in CARRIERS
        for node in ast.walk(tree)
        if isinstance(node, (ast.arg, ast.AnnAssign, ast.keyword)) and _carries(node)
    )


def _carries(node: ast.arg | ast.AnnAssign | ast.keyword) -> bool:
    match node:
        case ast.arg(arg=name):
            return name in OPTIONS
        case ast.AnnAssign(target=ast.Name(id=name)):
            return name in OPTIONS
        case ast.keyword(arg=str(name), value=value):
            names = {n.attr for n in ast.walk(value) if isinstance(n, ast.Attribute)}
            names |= {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
            return name in OPTIONS and bool(names & OPTIONS)
    return False


def _literals(source: Path, trees: dict[Path, ast.Module]) -> int:
    """Count component names written as strings where every family should fit."""
    return sum(
        isinstance(node, ast.Constant) and node.value in COMPONENTS
        for path, tree in trees.items()
        if not _may_name(path.relative_to(source))
        for node in ast.walk(tree)
    )


def _may_name(path: Path) -> bool:
    """Whether a file belongs to a family, to a kind of network, or to the kinds' table."""
    parts = path.parts
    inside_family = parts[0] == "models" and (len(parts) > 2 or path.stem == "sd3")  # noqa: PLR2004
    return inside_family or path.as_posix() in ("weights/kinds.py", "weights/deepgen_pt.py")


if __name__ == "__main__":
    main()
