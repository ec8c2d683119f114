"""Mix-and-match (MAM) adapter: a short prefix at attention, a scaled parallel adapter at the feed-forward network.

With `l(x)` the share of the softmax that the prefix takes, attention becomes `(1 - l(x)) h + l(x) softmax(x W_q P_k^T)
P_v`; so a new adapter does not start at the base, as the methods without a prefix do.

He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2021, arXiv:2110.04366.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.adapters.methods._base import register
from toolkit.adapters.methods._unified import Activation, Design, Place, UnifiedConfig, UnifiedLayer


@dataclass
class MixAndMatchConfig(UnifiedConfig):
    """Mix-and-match adapter.

    Attributes:
        prefix: tokens of the prefix.
        size: width of the bottleneck.
        scale: of what the bottleneck adds.
        activation: in it.
        biases: whether its projections have them.
    """

    prefix: int = 30
    size: int = 512
    scale: float = 4.0
    activation: Activation = "relu"
    biases: bool = True

    def places(self) -> tuple[Place, ...]:
        """Return both sublayers."""
        return ("attention", "ffn")

    def design(self, place: Place) -> Design:
        """Return a prefix, or a scaled parallel bottleneck."""
        if place == "attention":
            return Design("prefix", self.prefix)
        return Design("bottleneck", self.size, "parallel", self.scale, self.activation, self.biases)


class MixAndMatchLayer(UnifiedLayer):
    """A sublayer with a prefix or a bottleneck."""

    TRAINED = (*UnifiedLayer.TRAINED, "prefix_keys", "prefix_values")


register("mix_and_match", MixAndMatchConfig, MixAndMatchLayer)
