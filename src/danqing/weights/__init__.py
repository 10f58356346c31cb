"""Weights on disk: found, identified and checked before anything large is read.

`read_contents` recognises what lies at a place; `danqing.models.open_checkpoint` has a family name
it. A `Checkpoint` knows its components, their tensors by name (from the files' headers) and their
configs; tensors are read lazily, mapped from disk.
"""

from danqing.weights.checkpoint import Checkpoint, Component
from danqing.weights.contents import Contents
from danqing.weights.digests import known_digests
from danqing.weights.gguf_file import QUANTISED
from danqing.weights.layouts import LAYOUTS, PART, read_contents, read_parts
from danqing.weights.parts import EMBEDDED
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
    "Contents",
    "TensorEntry",
    "known_digests",
    "read_contents",
    "read_parts",
]
