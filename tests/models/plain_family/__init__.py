"""A family as docs/adding/model.md asks for, without a module `writing`."""

from danqing.models.flux import PIPELINE, SLOTS, identify, open_model, spec

__all__ = ["PIPELINE", "SLOTS", "identify", "open_model", "spec"]
