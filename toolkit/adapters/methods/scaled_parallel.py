"""Scaled parallel adapter: a bottleneck beside the feed-forward network, `h <- FFN(x) + s up act(down x)`.

A parallel adapter with the scale of LoRA; beside a linear and without activation and biases it is LoRA.

He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2021, arXiv:2110.04366.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from toolkit.adapters.methods._base import register
from toolkit.adapters.methods._unified import Activation, Design, Place, UnifiedConfig, UnifiedLayer


@dataclass
class ScaledParallelConfig(UnifiedConfig):
    """Scaled parallel adapter.

    Attributes:
        sublayers: beside which it is: `attention`, `ffn`, or both.
        size: width of the bottleneck.
        scale: `s`.
        activation: in it.
        biases: whether its projections have them.
    """

    sublayers: list[Place] = field(default_factory=lambda: ["ffn"])
    size: int = 64
    scale: float = 4.0
    activation: Activation = "relu"
    biases: bool = True

    def places(self) -> tuple[Place, ...]:
        """Return the sublayers."""
        return tuple(self.sublayers)

    def design(self, place: Place) -> Design:
        """Return a scaled parallel bottleneck."""
        return Design("bottleneck", self.size, "parallel", self.scale, self.activation, self.biases)


class ScaledParallelLayer(UnifiedLayer):
    """A sublayer or a linear with scaled bottlenecks beside it."""


register("scaled_parallel", ScaledParallelConfig, ScaledParallelLayer)
