"""A family as docs/adding/model.md asks for, without a module `writing`."""

from danqing.models.flux import MODEL, PIPELINE, SLOTS, identify, spec

__all__ = ["MODEL", "PIPELINE", "SLOTS", "identify", "spec"]
