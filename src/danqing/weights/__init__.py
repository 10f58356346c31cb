"""Weights on disk: found, identified and checked before anything large is read.

`open_checkpoint` is the door. A `Checkpoint` knows its components, their tensors by name (from the
files' headers) and their configs; tensors are read lazily, mapped from disk.
"""

from danqing.weights.checkpoint import Checkpoint, Component
from danqing.weights.digests import known_digests
from danqing.weights.gguf_file import QUANTISED
from danqing.weights.layouts import EMBEDDED, LAYOUTS, PART, open_checkpoint, open_part
from danqing.weights.places import BUILT_IN, POCKET
from danqing.weights.tensor_file import TensorEntry

__all__ = [
    "BUILT_IN",
    "EMBEDDED",
    "LAYOUTS",
    "PART",
    "POCKET",
    "QUANTISED",
    "Checkpoint",
    "Component",
    "TensorEntry",
    "known_digests",
    "open_checkpoint",
    "open_part",
]
