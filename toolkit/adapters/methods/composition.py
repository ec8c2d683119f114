"""Composition: adapters of any kinds put together as a tree says, `stack`, `average`, `parallel` and `fuse`.

`compose: {stack: [grammar, {average: [sort, upper], weights: [0.7, 0.3]}]}` is one. What `fuse` mixes by is trained,
the sources are not. The folder that is saved holds the tensors of the sources as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.adapters.compose import tree
from toolkit.adapters.compose.layer import ComposedConfig, ComposedLayer
from toolkit.adapters.methods._base import register


@dataclass
class CompositionConfig(ComposedConfig):
    """A composition.

    Attributes:
        compose: a name, or a tree such as `{average: [sort, upper]}`; by default the average of all sources.
    """

    compose: Any = None

    def tree(self) -> tree.Node:
        """Return the tree."""
        return tree.parse({"average": list(self.sources)} if self.compose is None else self.compose)


class CompositionLayer(ComposedLayer):
    """A module with a composition around it."""


register("composition", CompositionConfig, CompositionLayer)
