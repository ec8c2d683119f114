"""Bottleneck adapters after sublayers: `h <- h + up act(down h)`, of what leaves the sublayer.

`houlsby` puts one after attention and after the feed-forward network, `pfeiffer` after the latter alone. Both sit
before the residual is added, as the models of today normalise what enters a sublayer.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, arXiv:1902.00751; Pfeiffer et al.,
"AdapterFusion: Non-Destructive Task Composition for Transfer Learning", 2020, arXiv:2005.00247.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from toolkit.adapters.methods._base import register
from toolkit.adapters.methods._unified import Activation, Design, Place, UnifiedConfig, UnifiedLayer


@dataclass
class BottleneckConfig(UnifiedConfig):
    """Bottleneck adapters.

    Attributes:
        variant: `houlsby` or `pfeiffer`.
        size: width of the bottleneck.
        activation: in it.
        scale: of what it adds.
        biases: whether its projections have them.
    """

    variant: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    size: int = 64
    activation: Activation = "relu"
    scale: float = 1.0
    biases: bool = True

    def __post_init__(self) -> None:
        if self.variant not in ("houlsby", "pfeiffer"):
            raise ValueError(f"variant is houlsby or pfeiffer, not {self.variant!r}")
        super().__post_init__()

    def places(self) -> tuple[Place, ...]:
        """Return the sublayers of the variant."""
        return ("attention", "ffn") if self.variant == "houlsby" else ("ffn",)

    def design(self, place: Place) -> Design:
        """Return a sequential bottleneck."""
        return Design("bottleneck", self.size, "sequential", self.scale, self.activation, self.biases)


class BottleneckLayer(UnifiedLayer):
    """A sublayer with bottlenecks after it."""


register("bottleneck", BottleneckConfig, BottleneckLayer)
