"""What danqing knows about one kind of network, whichever family uses it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from danqing.errors import CheckpointDamagedError, CheckpointIncompleteError
from danqing.models.config_tables import Config, read_config
from danqing.networks.loading import Row, identity_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from danqing.models import config_tables
    from danqing.weights import Component

TOKEN_COPIES = 24
"""Numbers a transformer's block holds for each token and channel at its worst."""


class NetworkKind(ABC):
    """A kind of network; subclasses are tables with a few functions and hold no state.

    Where a method takes `config`, it is the made network's own, the library's defaults filled in;
    where it takes `values`, it is what the checked config file says.

    Attributes:
        table: keys and values that its config may have.
        counted: keys of the config that the tensors' names tell as well.
        overflow: why it stays in float32 where the model computes in float16; empty if it does not.
        wide_tensors: the same of single tensors.
        library: whose class saves it: diffusers or transformers.
        class_name: of that class; empty if the pipeline's index does not list it.
        embedder: of a denoiser, path of the layer that embeds timestep and pooled prompt.
    """

    table: ClassVar[config_tables.Kind]
    counted: ClassVar[tuple[str, ...]] = ()
    overflow: ClassVar[str] = ""
    wide_tensors: ClassVar[str] = ""
    library: ClassVar[str] = "diffusers"
    class_name: ClassVar[str] = ""
    embedder: ClassVar[str] = ""

    # --- config ----------------------------------------------------------------------------------

    def read_config(self, part: Component, assumed: Mapping[str, Any]) -> Config:
        """Return the config that came with a component, checked, or what its shapes tell.

        Args:
            part: the component.
            assumed: values the family knows and shapes do not tell.

        Raises:
            CheckpointError: the config is unusable, or missing where shapes do not tell enough.
        """
        if part.config is None:
            return Config(values={**self.derive(part), **assumed})
        found = read_config(self.table, self.own_config(part), name=part.name, place=part.folder)
        self.check_values(found.values, part.folder)
        return found

    def own_config(self, part: Component) -> Mapping[str, Any]:
        """Return the part of a config file that is about this network."""
        return part.config or {}

    def derive(self, part: Component) -> dict[str, Any]:
        """Return as much of a config as the shapes tell.

        Raises:
            CheckpointIncompleteError: shapes do not tell enough of this kind.
        """
        raise CheckpointIncompleteError(
            f"the {part.name} came without a config",
            seen=part.files[0] if part.files else part.folder,
            allowed="a config.json beside it",
        )

    def check_values(self, values: Mapping[str, Any], place: Path) -> None:  # noqa: B027
        """Check values of a config against each other; a CheckpointDamagedError says what fails."""

    def counts(self, part: Component, values: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """Return how many layers the tensors are of, by the config's key; `a.b` is a nested key.

        Raises:
            CheckpointError: tensors that would tell are missing.
        """
        if not self.counted:
            return {}
        derived = self.derive(part)
        return {key: derived[key] for key in self.counted}

    # --- network ---------------------------------------------------------------------------------

    @abstractmethod
    def make(self, values: Mapping[str, Any]) -> Any:
        """Make the network; it is called on the meta device."""

    def rows(
        self,
        part: Component,  # noqa: ARG002
        values: Mapping[str, Any],  # noqa: ARG002
        shapes: Mapping[str, Any],
    ) -> Iterable[Row]:
        """Return the key map of the style in which the files name their tensors."""
        return identity_rows(shapes)

    def published(self, shapes: Mapping[str, Any]) -> Iterable[Row]:
        """Return the key map of the names under which its library saves it."""
        return identity_rows(shapes)

    def ignored(self, name: str) -> bool:  # noqa: ARG002
        """Say whether a tensor of the files is known to be of no use."""
        return False

    def tensor_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:  # noqa: ARG002
        """Return what one tensor is kept in when the network computes in `dtype`."""
        return dtype

    def finish(self, module: Any, device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027
        """Change layers once the weights are in their places."""

    def once(self, module: Any) -> list[str]:  # noqa: ARG002
        """Return the layers that see only timestep and pooled prompt: needed in the first step."""
        return []

    def vocabulary(self, config: Any) -> int:
        """Return how many tokens a text encoder knows."""
        return int(config.vocab_size)

    # --- cost ------------------------------------------------------------------------------------

    def numbers(self, config: Any) -> int:
        """Return how many numbers are held at most for each token (each pixel of an image)."""
        raise NotImplementedError

    def flops(self, config: Any, elements: int, tokens: int) -> float:  # noqa: ARG002
        """Return the operations of one pass over so many tokens (pixels of an image).

        Args:
            config: of the network.
            elements: numbers its repeated blocks hold.
            tokens: of one row.
        """
        return 2 * elements * tokens


class Transformer(NetworkKind):
    """What denoisers have in common that are transformers over patches of latents."""

    embedder: ClassVar[str] = "time_text_embed"

    def once(self, module: Any) -> list[str]:
        """Return the layers that modulate the blocks."""
        from danqing.networks.of_diffusers import modulations

        return modulations(module)

    def width(self, config: Any) -> int:
        """Return the channels of a token."""
        return int(config.num_attention_heads) * int(config.attention_head_dim)

    def numbers(self, config: Any) -> int:
        """Return what a block holds for a token."""
        return self.width(config) * TOKEN_COPIES

    def patch(self, config: Any) -> int:
        """Return the side of a patch, in latents."""
        return int(config.patch_size)

    def conditioning_size(self, config: Any, tokens: int) -> int:
        """Return the size of its conditioning: a context of so many tokens, and a pooled vector."""
        return tokens * int(config.joint_attention_dim) + int(config.pooled_projection_dim)


# --- shapes --------------------------------------------------------------------------------------


def count(part: Component, prefix: str) -> int:
    """Return how many numbers follow a prefix: blocks of a list, levels of a pyramid."""
    names = part.entries
    return len({n[len(prefix) :].split(".")[0] for n in names if n.startswith(prefix)})


def side(part: Component, name: str, axis: int) -> int:
    """Return one side of a tensor, at least 1.

    Raises:
        CheckpointError: the tensor is missing, or has no such side.
    """
    shape = _shape(part, name)
    if len(shape) <= axis or not shape[axis]:
        raise _impossible(part, name)
    return shape[axis]


def shape_of(part: Component, name: str, sides: int) -> tuple[int, ...]:
    """Return a tensor's shape of so many sides, each at least 1.

    Raises:
        CheckpointError: the tensor is missing, or has another number of sides.
    """
    shape = _shape(part, name)
    if len(shape) != sides or not all(shape):
        raise _impossible(part, name)
    return shape


def _shape(part: Component, name: str) -> tuple[int, ...]:
    entry = part.entries.get(name)
    if entry is None:
        raise CheckpointIncompleteError(
            f"the {part.name} lacks a tensor that every network of its kind has",
            seen=f"{part.files[0]}: no {name}",
        )
    return entry.shape


def _impossible(part: Component, name: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"a tensor of the {part.name} has an impossible shape",
        seen=f"{part.files[0]}: {name} is {list(part.entries[name].shape)}",
    )


# --- transformers --------------------------------------------------------------------------------
