"""Opens a file of tensors by what it begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danqing.files import open_regular
from danqing.weights.gguf_file import MAGIC, GgufFile
from danqing.weights.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.weights.tensor_file import TensorFile


def open_tensors(path: Path) -> TensorFile:
    """Return the file's reader; its header is read on first use.

    What is neither GGUF nor safetensors is told when the header is read.
    """
    try:
        with open_regular(path) as file:
            start = file.read(len(MAGIC))
    except OSError:
        start = b""  # told, as every other trouble, on first use
    return GgufFile(path) if start == MAGIC else SafetensorsFile(path)
