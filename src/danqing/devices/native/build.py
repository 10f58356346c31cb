"""Compiles the kernels for the processor at hand, once; later runs load what lies in the cache."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from danqing.cache import cache_folder

SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp"]
_NAME = "kernels.so"


@lru_cache(maxsize=1)
def load() -> Any:
    """Return the compiled library, or None where it cannot be had: then torch's kernels compute.

    Compiling takes a few seconds, once for each processor, compiler and version of this file.
    """
    compiler, threads = shutil.which("g++"), _openmp()
    if compiler is None or threads is None:
        return None
    built = _folder(compiler, threads) / _NAME
    if not built.is_file() and not _compile(compiler, threads, built):
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


def _folder(compiler: str, threads: str) -> Path:
    from danqing.devices.cpu import cpu_flags, cpu_model

    stamp = f"{cpu_model()} {sorted(cpu_flags())} {compiler} {_FLAGS} {threads}".encode()
    digest = hashlib.sha256(stamp + SOURCE.read_bytes()).hexdigest()[:16]
    return cache_folder() / "native" / digest


def _compile(compiler: str, threads: str, built: Path) -> bool:
    """Compile beside the cache and move it there whole; two at a time do no harm."""
    work = built.parent.with_name(f".{built.parent.name}-{os.getpid()}")
    try:
        work.mkdir(parents=True, exist_ok=True)
        thing, library = str(work / "kernels.o"), str(work / _NAME)
        for command in (
            [compiler, *_FLAGS, "-c", str(SOURCE), "-o", thing],
            [compiler, "-shared", thing, threads, "-o", library],
        ):
            subprocess.run(command, check=True, capture_output=True)
        built.parent.mkdir(parents=True, exist_ok=True)
        Path(library).replace(built)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        sys.stderr.write(
            f"danqing: note: the kernels for this processor cannot be compiled, torch's are used: "
            f"{said[0] if said else error}\n"
        )
        return False
    except OSError:
        return False  # nowhere to write: torch's kernels compute
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return True
