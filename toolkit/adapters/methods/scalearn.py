"""ScaLearn: outputs of trained adapters, summed with learned scales; the adapters stay as they are.

`y + sum_s w_s * (o_s - y)` at every module: the residual stays outside of the sum. A scale is a vector or, `uniform`,
one number per source and module; `shared`, modules of a kind have it in common, and the uniform ones of the whole
model, so that eight sources cost eight parameters. In the paper's words: ScaLearn, ScaLearnUniform, ScaLearn++ and
ScaLearnUniform++.

Frohmann et al., "ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale", 2023,
arXiv:2310.01217.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.adapters.compose import tree
from toolkit.adapters.compose.layer import ComposedConfig, ComposedLayer
from toolkit.adapters.methods._base import register


@dataclass
class ScalearnConfig(ComposedConfig):
    """ScaLearn.

    Attributes:
        uniform: one number per source, and not one per entry of the output.
        shared: one set of scales for all layers.
        start: of every scale; `1 / sources` by default.
    """

    uniform: bool = False
    shared: bool = False
    start: float | None = None

    def tree(self) -> tree.Node:
        """Return one `fuse` of all sources."""
        by = f"scalearn{'_uniform' * self.uniform}{'++' * self.shared}"
        return tree.Fuse(tuple(map(tree.Leaf, self.sources)), by, self.start)  # pyright: ignore[reportArgumentType]


class ScalearnLayer(ComposedLayer):
    """A module whose adapters are mixed with learned scales."""


register("scalearn", ScalearnConfig, ScalearnLayer)
