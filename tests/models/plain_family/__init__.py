"""A family as docs/adding/model.md asks for, without a module `writing`."""

from danqing.models.flux import PARTS, identify, is_transformer, open_model, spec

__all__ = ["PARTS", "identify", "is_transformer", "open_model", "spec"]
