"""Parallel adapter: a bottleneck beside the feed-forward network, `h <- FFN(x) + up act(down x)`.

He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2021, arXiv:2110.04366.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from toolkit.adapters.methods._base import register
from toolkit.adapters.methods._unified import Activation, Design, Place, UnifiedConfig, UnifiedLayer


@dataclass
class ParallelAdapterConfig(UnifiedConfig):
    """Parallel adapter.

    Attributes:
        sublayers: beside which it is: `attention`, `ffn`, or both.
        size: width of the bottleneck.
        activation: in it.
        biases: whether its projections have them.
    """

    sublayers: list[Place] = field(default_factory=lambda: ["ffn"])
    size: int = 64
    activation: Activation = "relu"
    biases: bool = True

    def places(self) -> tuple[Place, ...]:
        """Return the sublayers."""
        return tuple(self.sublayers)

    def design(self, place: Place) -> Design:
        """Return a parallel bottleneck."""
        return Design("bottleneck", self.size, "parallel", 1.0, self.activation, self.biases)


class ParallelAdapterLayer(UnifiedLayer):
    """A sublayer with bottlenecks beside it."""


register("parallel_adapter", ParallelAdapterConfig, ParallelAdapterLayer)
