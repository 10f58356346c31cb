"""Compiles the device for the torch at hand, once; later runs load what lies in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from danqing import cache
from danqing.atomic import temporary_folder
from danqing.errors import InstallationError

if TYPE_CHECKING:
    from types import ModuleType

NAME = "danqing_simulated"
SOURCE = Path(__file__).with_name("device.cpp")
_FLAGS = ["-O1"]


def load() -> ModuleType:
    """Return the compiled module; the first time takes about half a minute.

    Raises:
        InstallationError: there is no compiler, or it fails.
    """
    folder = cache_folder()
    built = folder / f"{NAME}.so"
    if not built.is_file():
        _compile(folder)
    spec = importlib.util.spec_from_file_location(NAME, built)
    if spec is None or spec.loader is None:
        raise InstallationError("the simulated device cannot be loaded", seen=built)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise InstallationError(
            "the simulated device cannot be loaded", seen=error, hint=f"remove {folder}"
        ) from error
    return module


def cache_folder() -> Path:
    """Return where it lies: one folder for each torch, Python and source."""
    import torch

    stamp = f"{torch.__version__} {sysconfig.get_platform()} {sys.version} {_FLAGS}".encode()
    digest = hashlib.sha256(stamp + SOURCE.read_bytes()).hexdigest()[:16]
    return cache.cache_folder() / "simulated" / digest


def _compile(folder: Path) -> None:
    """Compile for the cache, whole or not at all."""
    _check_tools()
    from torch.utils.cpp_extension import load as compile_and_load

    said = io.StringIO()
    sys.stderr.write("danqing: compiling the simulated device, once for this torch ...\n")
    try:
        cache.make_folder(folder)
        with temporary_folder(folder) as work, contextlib.redirect_stdout(said):
            compile_and_load(
                name=NAME, sources=[str(SOURCE)], extra_cflags=_FLAGS, build_directory=str(work),
                is_python_module=False, is_standalone=False,
            )  # fmt: skip
            (work / f"{NAME}.so").replace(folder / f"{NAME}.so")
    except (RuntimeError, OSError) as error:
        raise InstallationError(
            "the simulated device cannot be compiled",
            seen=str(error)[-1500:],
            hint="it needs g++, ninja and Python's headers (python3-dev)",
        ) from error


def _check_tools() -> None:
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        missing.append(f"Python.h ({headers})")
    if missing:
        raise InstallationError(
            "the simulated device must be compiled, and a tool for it is missing",
            seen=", ".join(missing),
            hint="apt-get install g++ ninja-build python3-dev, or your system's like",
        )
