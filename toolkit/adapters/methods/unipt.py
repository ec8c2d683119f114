"""UniPT: every layer's states, each compared with the last layer's, weighted by a learned confidence.

With `t_l` the projected states of layer l and `a` those of the last: `m_l = t_l + N(relu(a t_l^T)) t_l`, where `N` lets
each row add up to one and a token sees none after it; the confidence of a layer at a token is the softmax over layers
of `gate(a * t_l)`; added to the decoder's output is `up(relu(a + proj(sum_l c_l m_l)))`, and `up` starts at zero. The
paper, on encoders, averages over tokens before the gate, which a causal model cannot.

Diao et al., "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory", 2023,
arXiv:2308.14316.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.adapters.methods._base import Site, register
from toolkit.adapters.methods._decoder import DecoderConfig, SideLayer, chosen_layers
from toolkit.adapters.taps import Call, Taps, extend, visible


@dataclass
class UniptConfig(DecoderConfig):
    """UniPT.

    Attributes:
        reduction: how many times narrower the network is; divides the hidden size.
        layers: numbers of the layers that are compared with the last; by default all before it.
    """

    reduction: int = 4
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction < 1:
            raise ValueError("reduction is at least 1")


class UniptNetwork(nn.Module):
    """The network beside the decoder.

    Args:
        sources: layers that are compared with the last.
        wide: hidden size.
        narrow: of the network.
        first: number of its first layer in a cache.
    """

    def __init__(self, sources: list[int], wide: int, narrow: int, first: int) -> None:
        super().__init__()
        self.sources, self.first = sources, first
        self.downs = nn.ModuleList(nn.Sequential(nn.Linear(wide, narrow), nn.LayerNorm(narrow)) for _ in sources)
        self.anchor = nn.Sequential(nn.Linear(wide, narrow), nn.LayerNorm(narrow))
        self.gate = nn.Linear(narrow, 1, bias=False)
        self.proj = nn.Linear(narrow, narrow)
        self.up = nn.Linear(narrow, wide)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, taps: Taps) -> Tensor:
        """Return what is added, `[B, T, H]`."""
        dtype = self.up.weight.dtype
        anchor = self.anchor(taps.states[-1].to(dtype))
        targets = [down(taps.states[s + 1].to(dtype)) for down, s in zip(self.downs, self.sources, strict=True)]
        confidence = self.confidences(anchor, targets)
        merged = torch.zeros_like(anchor)
        for k, (source, target) in enumerate(zip(self.sources, targets, strict=True)):
            seen = self._all(target, taps.calls[source], k, source)
            mask = visible(taps.calls[source], target.shape[1], seen.shape[1], target.device)
            merged = merged + confidence[k] * (target + interaction(anchor, seen, mask))
        return self.up(functional.relu(anchor + self.proj(merged)))

    def confidences(self, anchor: Tensor, targets: list[Tensor]) -> Tensor:
        """Return how much each layer counts at each token, `[layers, B, T, 1]`, one in sum."""
        return torch.stack([self.gate(anchor * target) for target in targets]).softmax(0)

    def _all(self, target: Tensor, call: Call, k: int, source: int) -> Tensor:
        """Return a layer's projected states of all tokens so far, which are kept in the model's cache."""
        if call.cache is None:
            return target
        extend(call.cache, self.first + k, source)
        states: Any = target[:, None]
        return call.cache.update(states, states[..., :0], self.first + k)[0][:, 0]


def interaction(anchor: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return `N(relu(anchor target^T)) target`, nothing where no product is positive.

    Args:
        anchor: `[B, Q, h]`.
        target: `[B, K, h]`.
        mask: `[B or 1, Q, K]`, which of them each token sees.
    """
    weights = functional.relu(anchor @ target.transpose(1, 2)) * mask
    total = weights.sum(-1, keepdim=True)
    return (weights / total.where(total > 0, 1)) @ target


class UniptLayer(SideLayer):
    """A decoder with UniPT beside it."""

    def make(self, config: UniptConfig, site: Site) -> UniptNetwork:
        """Return a new network."""
        count, wide = len(self.layers), site.config.get_text_config().hidden_size
        if wide % config.reduction or count < 2:
            raise ValueError(f"reduction {config.reduction} does not divide {wide}, or the decoder has one layer alone")
        sources = chosen_layers(list(range(count - 1)) if config.layers is None else config.layers, count)
        taken = sum(len(network.sources) for network in self.networks.values())  # pyright: ignore[reportArgumentType,reportAttributeAccessIssue]
        return UniptNetwork(sources, wide, wide // config.reduction, count + taken)


register("unipt", UniptConfig, UniptLayer)
