"""AdapterFusion: outputs of trained adapters, mixed by attention for every token; the adapters stay as they are.

At every module the output asks, and what each adapter adds to it answers: `y + sum_s softmax_s(Q y . K d_s) V d_s`
with `d_s = o_s - y`, and three trained matrices per module. V starts as the identity.

Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", 2020, arXiv:2005.00247.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.adapters.compose import tree
from toolkit.adapters.compose.layer import ComposedConfig, ComposedLayer
from toolkit.adapters.methods._base import register


@dataclass
class AdapterFusionConfig(ComposedConfig):
    """AdapterFusion."""

    def tree(self) -> tree.Node:
        """Return one `fuse` of all sources."""
        return tree.Fuse(tuple(map(tree.Leaf, self.sources)), "adapter_fusion")


class AdapterFusionLayer(ComposedLayer):
    """A module whose adapters are mixed by attention."""


register("adapter_fusion", AdapterFusionConfig, AdapterFusionLayer)
