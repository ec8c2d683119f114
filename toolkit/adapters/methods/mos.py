"""Mixture of Shards: LoRA whose factors are put together from shards of pools that all layers share.

All modules of one kind (say, every `q_proj`) share a pool of A shards and one of B shards. A module draws indices
into each once: shards that others may use too, and some of its own ("privatization"). The drawn shards, concatenated,
are its A `[r, in]` and B `[out, r]`: a rank `r` for the parameters of a rank `e`. Indices of A and B are drawn apart
("pair dissociation"), stored with the adapter, and not trained.

Wang et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards", 2024,
arXiv:2410.00938. (Not Mixture-of-Students.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.adapters.methods._base import AdapterConfig, AdapterLayer, LowRank, Site, register, uniform


@dataclass
class MosConfig(AdapterConfig):
    """Mixture of Shards.

    Attributes:
        r: rank of every module.
        alpha: the change is multiplied with `alpha / r`.
        equivalent_rank: rank of plain LoRA with as many trained parameters.
        shards: pieces that a vector is cut into; divides the sizes of every module.
        private_rank: ranks of a module whose shards no other module uses.
        dropout: of the input, in training.
        seed: of the indices.
    """

    r: int = 8
    alpha: float = 16.0
    equivalent_rank: int = 2
    shards: int = 4
    private_rank: int = 1
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r, self.equivalent_rank, self.shards) < 1:
            raise ValueError("r, equivalent_rank and shards are at least 1")
        if not 0 <= self.private_rank <= min(self.r, self.equivalent_rank):
            raise ValueError("private_rank lies between 0 and the smaller of r and equivalent_rank")
        if self.private_rank == self.equivalent_rank != self.r:
            raise ValueError("where every shard is private (private_rank = equivalent_rank), r is the same number")


class MosLinear(AdapterLayer):
    """A linear whose low-rank factors are made of shards; the first of its kind holds the pools."""

    TRAINED = ("pool_a", "pool_b")
    STORED = ("index_a", "index_b")

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__(base_layer)
        # In a plain dict, so that a pool is a parameter of one module alone: trained once, stored once.
        self.holders: dict[str, MosLinear] = {}
        self.other_param_names = (*self.other_param_names, "holders")

    def start(self, config: MosConfig, site: Site) -> Mapping[str, Tensor]:
        """Draw the indices, and in the first module of a kind the pools."""
        inputs, outputs = self.sizes
        shards = config.shards
        if inputs % shards or outputs % shards:
            raise ValueError(f"{shards} shards do not divide its sizes {inputs} and {outputs}")
        tensors = {f"index_{pool}": _draw(config, site, pool) for pool in "ab"}
        if site.index == 0:
            rows = config.equivalent_rank * site.count * shards
            tensors["pool_a"] = uniform((rows, inputs // shards), fan_in=inputs)
            tensors["pool_b"] = torch.zeros(rows, outputs // shards)
        return tensors

    def add(self, adapter: str, config: Any, site: Site) -> None:
        """Make a new adapter on this layer, and remember who holds its pools."""
        assert isinstance(site.first, MosLinear)
        super().add(adapter, config, site)
        if site.first is not self:
            self.holders[adapter] = site.first

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A `[r, in]` and B `[out, r]`."""
        inputs, outputs = self.sizes
        holder = self.holders.get(adapter, self)
        index_a, index_b = self.tensor(adapter, "index_a"), self.tensor(adapter, "index_b")
        a, b = (holder.tensor(adapter, pool).to(index_a.device) for pool in ("pool_a", "pool_b"))
        return a[index_a].reshape(-1, inputs), b[index_b].reshape(-1, outputs).T

    def change(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `alpha / r * B A x`."""
        config = self.configs[adapter]
        a, b = self.factors(adapter)
        x = functional.dropout(x, config.dropout, self.training)
        return functional.linear(functional.linear(x, a), b) * (config.alpha / config.r)

    def low_rank(self, adapter: str) -> LowRank:
        """Return the factors."""
        config = self.configs[adapter]
        return LowRank(*self.factors(adapter), config.alpha / config.r)

    def _dtype(self, adapter: str, default: torch.dtype) -> torch.dtype:
        return self.holders.get(adapter, self).tensor(adapter, "pool_a").dtype


def _draw(config: MosConfig, site: Site, pool: str) -> Tensor:
    """Return the rows `[r * shards]` of a pool that a module is made of: public ones, then its own."""
    size = config.shards
    public = (config.equivalent_rank - config.private_rank) * site.count * size
    wanted, own = (config.r - config.private_rank) * size, config.private_rank * size
    if wanted > public:
        raise ValueError(f"r needs {wanted} shared shards of {public}; raise equivalent_rank, or lower r")
    seed = blake2b(f"{config.seed}/{site.key}/{pool}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
    drawn = torch.randperm(public, generator=generator)[:wanted]
    begin = public + site.index * own
    return torch.cat([drawn, torch.arange(begin, begin + own)])


register("mos", MosConfig, MosLinear)
