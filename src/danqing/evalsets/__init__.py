"""Benchmarks' protocols as data: what is painted, with which settings, and how the files are named.

Scoring is each benchmark's own program's work; here its folder is filled with our pictures. The
prompts come from the user's copy of the benchmark.
"""

from danqing.evalsets.painting import Task, paint_set
from danqing.evalsets.protocols import PROTOCOLS, Protocol

__all__ = ["PROTOCOLS", "Protocol", "Task", "paint_set"]
