"""What the host's processor has, and C++ of ours compiled for it, once.

Kernels are an extra: without a compiler, or with one that fails, what they replace computes. They
are plain functions over pointers, called through ctypes, so that nothing is built at installation.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from danqing.atomic import lock, temporary_folder
from danqing.cache import cache_folder, make_folder

_FLAGS = [
    "-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off",
]  # fmt: skip
_NAME = "kernels.so"
_LOCK_SECONDS = 300.0


@lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        rows = (line.partition(":") for line in lines)
        table: dict[str, str] = {}
        for name, _, value in rows:
            table.setdefault(name.strip(), value.strip())
        return table
    return {}


def cpu_flags() -> frozenset[str]:
    """Return the processor's features by their names in /proc/cpuinfo (empty off Linux)."""
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def cpu_model() -> str:
    """Return the processor's model name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@lru_cache
def compiled(source: Path) -> Any:
    """Return the library of a C++ file, or None where it cannot be had.

    Compiling takes a few seconds, once for each processor, compiler and version of the file; the
    result lies in the cache.
    """
    compiler, threads = shutil.which("g++"), _openmp()
    if compiler is None or threads is None:
        return None
    built = _folder(source, compiler, threads) / _NAME
    if not built.is_file() and not _compile(source, compiler, threads, built):
        return None
    try:
        return ctypes.CDLL(str(built))
    except OSError:
        return None


def _openmp() -> str | None:
    """Return torch's own OpenMP library: with another, two sets of threads would wait in turn."""
    import torch  # noqa: F401 - loads it

    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split()[-1]
            if re.fullmatch(r".*/libgomp[^/]*\.so[^/]*", path):
                return path
    return None


def _folder(source: Path, compiler: str, threads: str) -> Path:
    stamp = f"{cpu_model()} {sorted(cpu_flags())} {compiler} {_FLAGS} {threads}".encode()
    digest = hashlib.sha256(stamp + source.read_bytes()).hexdigest()[:16]
    return cache_folder() / "native" / digest


def _compile(source: Path, compiler: str, threads: str, built: Path) -> bool:
    """Compile for the cache, whole or not at all; of many first starts, one compiles."""
    try:
        make_folder(home := built.parent.parent)
        with lock(home, seconds=_LOCK_SECONDS):
            if not built.is_file():
                _build(source, compiler, threads, built)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        sys.stderr.write(
            f"danqing: note: {source.name} cannot be compiled for this processor, which costs "
            f"speed alone: {said[0] if said else error}\n"
        )
        return False
    except OSError:
        return False  # nowhere to write
    return True


def _build(source: Path, compiler: str, threads: str, built: Path) -> None:
    with temporary_folder(built.parent.parent) as work:
        thing, library = work / "kernels.o", work / _NAME
        commands: tuple[list[str | Path], ...] = (
            [compiler, *_FLAGS, "-c", source, "-o", thing],
            [compiler, "-shared", thing, threads, "-o", library],
        )
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        built.parent.mkdir(exist_ok=True)
        library.replace(built)
