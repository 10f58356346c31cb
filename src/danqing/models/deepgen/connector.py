"""The connector: from a language model's states to what the transformer of SD3.5 is told.

The states of six depths are stacked by channels and projected, six plain transformer layers mix
them, and two heads give a pooled vector and a sequence (DeepGen 1.0, arXiv 2602.12205, with what
the released code and weights have: one linear layer before, no mask, no positions).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from danqing.models import config_tables
from danqing.models.config_tables import Config, read_config
from danqing.models.deepgen import configs
from danqing.models.kinds.base import NetworkKind
from danqing.networks.loading import Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from danqing.weights import Component


class ConnectorKind(NetworkKind):
    """The connector as a kind of network; its sizes are read off the shapes."""

    table: ClassVar[config_tables.Kind] = config_tables.CONNECTOR
    library: ClassVar[str] = "transformers"

    def read_config(self, part: Component, assumed: Mapping[str, Any]) -> Config:  # noqa: ARG002
        """Return sizes read off the shapes; heads and epsilon from the config, if there is one."""
        given = read_config(self.table, part.config or {}, name=part.name, place=part.folder)
        return replace(given, values=configs.connector_config(part, given.values))

    def make(self, values: Mapping[str, Any]) -> Any:
        """Make a `Connector`."""
        return Connector(values)

    def rows(
        self,
        part: Component,
        values: Mapping[str, Any],  # noqa: ARG002
        shapes: Mapping[str, Any],
    ) -> Iterable[Row]:
        """Match names; files differ in what the names of the layers begin with."""
        prefix, ours = configs.layers_prefix(part), "layers."
        for name in shapes:
            yield Row(prefix + name.removeprefix(ours) if name.startswith(ours) else name, (name,))

    def published(self, shapes: Mapping[str, Any]) -> Iterable[Row]:
        """Use the names of the released file."""
        return [Row(f"connector.{n}" if n.startswith("layers.") else n, (n,)) for n in shapes]


class Connector(nn.Module):
    """Queries, projections and layers.

    Attributes:
        meta_queries: (queries, hidden of the language model), appended to every prompt.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Make it; the keys of the config are those of `configs.connector_config`."""
        super().__init__()
        hidden = config["hidden_size"]
        self.config = dict(config)
        self.meta_queries = nn.Parameter(torch.empty(config["num_queries"], config["query_size"]))
        self.projector_1 = nn.Linear(config["input_size"], hidden)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config["num_hidden_layers"]))
        self.projector_2 = nn.Linear(hidden, config["pooled_projection_dim"])
        self.projector_3 = nn.Linear(hidden, config["joint_attention_dim"])

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn stacked states into conditioning.

        Args:
            states: (rows, tokens, depths * hidden of the language model); padding counts.

        Returns:
            Pooled (rows, pooled width), and the sequence (rows, tokens, joint width).
        """
        mixed = self.projector_1(states)
        for layer in self.layers:
            mixed = layer(mixed)
        return self.projector_2(mixed.mean(dim=1)), self.projector_3(mixed)


class _Layer(nn.Module):
    """Attention without mask and a perceptron, each behind a layer norm."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        self.layer_norm1 = nn.LayerNorm(hidden, eps=eps)
        self.self_attn = _Attention(hidden, config["num_attention_heads"])
        self.layer_norm2 = nn.LayerNorm(hidden, eps=eps)
        self.mlp = _Perceptron(hidden, config["intermediate_size"])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self.self_attn(self.layer_norm1(states))
        mixed: torch.Tensor = states + self.mlp(self.layer_norm2(states))
        return mixed


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(hidden, hidden))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            self.get_submodule(name)(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out: torch.Tensor = self.get_submodule("out_proj")(mixed)
        return out


class _Perceptron(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(states), approximate="tanh"))
        return out
