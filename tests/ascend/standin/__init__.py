"""A stand-in CANN: lets the real torch_npu wheel run on a machine without an NPU.

`load` builds the libraries for the torch at hand (ten seconds, kept beside the temporary files),
loads them under the names torch_npu asks for, and imports it. What runs is Huawei's own Python and
C++ above kernels that are the CPU's: it proves the way through torch_npu, and nothing about the
numerics or the speed of an NPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PRELOADED = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")


def load() -> ctypes.CDLL:
    """Import torch_npu in this process; before anything imports torch.

    The environment may say otherwise: STANDIN_SOC, STANDIN_DEVICES, STANDIN_GIB.

    Returns:
        The library of operators, to be asked how often each ran.
    """
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    folder = build()
    for name in PRELOADED:
        ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
    from danqing.devices import import_torch

    import_torch()
    library = ctypes.CDLL(str(folder / "libopapi.so"), mode=ctypes.RTLD_GLOBAL)  # needs libtorch
    importlib.import_module("torch_npu")
    return library


def counts(library: ctypes.CDLL) -> dict[str, int]:
    """Return how often each operator ran."""
    text = ctypes.create_string_buffer(1 << 16)
    library.standin_counts(text, len(text))
    pairs = (pair.split("=") for pair in text.value.decode().split())
    return {name: int(count) for name, count in pairs}


def build() -> Path:
    """Compile the libraries, once for each torch and source."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    sources = [HERE / name for name in ("acl.cpp", "opapi.cpp")]
    version = (torch / "version.py").read_bytes()
    digest = hashlib.sha256(b"".join([version, *(one.read_bytes() for one in sources)]))
    folder = Path(tempfile.gettempdir()) / f"danqing-standin-{digest.hexdigest()[:16]}"
    if (folder / "libopapi.so").is_file():
        return folder
    work = Path(tempfile.mkdtemp(dir=tempfile.gettempdir()))
    shared = ["g++", "-O1", "-fPIC", "-shared"]
    _run([*shared, "-Wl,-soname,libascendcl.so", "-o", work / "libascendcl.so", sources[0]])
    for name in PRELOADED[1:]:
        empty = work / f"{name}.cpp"
        empty.write_text(f'extern "C" int standin_{name}() {{ return 0; }}\n')
        _run([
            *shared, f"-Wl,-soname,lib{name}.so", "-o", work / f"lib{name}.so", empty,
            "-Wl,--no-as-needed", f"-L{work}", "-lascendcl",
        ])  # fmt: skip
    include = torch / "include"
    _run([
        *shared, "-std=c++20", "-Wl,-soname,libopapi.so", f"-I{include}",
        f"-I{include / 'torch/csrc/api/include'}", "-o", work / "libopapi.so", sources[1],
        f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-L{work}", "-lascendcl",
        f"-Wl,-rpath,{torch / 'lib'}",
    ])  # fmt: skip
    try:
        work.rename(folder)
    except OSError:  # another process was faster
        assert (folder / "libopapi.so").is_file()
    return folder


def _run(words: list[object]) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
