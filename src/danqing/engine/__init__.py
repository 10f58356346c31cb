"""The engine: opens a checkpoint on a device under a plan, and turns requests into images."""

from danqing.engine.engine import Engine

__all__ = ["Engine"]
