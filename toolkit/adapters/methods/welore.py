"""WeLore: each weight gets the rank that its own singular values call for; only the low-rank ones are trained.

The singular values of every matrix are normalised to [0, 1], and those below one threshold, the same for the whole
model, are dropped. A matrix that loses a large enough share of them, and that two factors store in fewer numbers, is
replaced by `B A = (U sqrt(S)) (sqrt(S) V^T)`, which is trained. The others stay as they are: they have no low rank, and
are not trained. `merge_and_unload` gives the model with the products as weights.

Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", 2024,
arXiv:2407.11239.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.adapters.methods._base import AdapterConfig, Site, register
from toolkit.adapters.methods._replace import ReplacedLinear
from toolkit.adapters.methods._sites import target_weights

_FLAT = 1e-4
"""Spread of singular values, relative to the largest, that is rounding."""


@dataclass
class WeloreConfig(AdapterConfig):
    """WeLore.

    Attributes:
        reduction: share of all singular values of the adapted matrices that is dropped.
        tau: threshold of normalised singular values, instead of the one that `reduction` leads to.
        min_ratio: share of a matrix's singular values above which it becomes low-rank.
        ranks: of the matrices that became low-rank, by module; found where it is empty.
    """

    reduction: float = 0.5
    tau: float | None = None
    min_ratio: float = 0.5
    ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.reduction < 1 or not 0 <= self.min_ratio < 1:
            raise ValueError("reduction and min_ratio are at least 0 and below 1")
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise ValueError(f"tau lies between 0 and 1, not at {self.tau}")

    def resolve(self, model: nn.Module) -> None:
        """Find the ranks."""
        if self.ranks:
            return
        weights = dict(target_weights(self, model))
        values = {key: normalised(torch.linalg.svdvals(weight)) for key, weight in weights.items()}
        tau = self.tau if self.tau is not None else threshold(list(values.values()), self.reduction)
        ranks = {key: rank_of(s, weights[key].shape, tau, self.min_ratio) for key, s in values.items()}
        self.ranks = {key: rank for key, rank in ranks.items() if rank is not None}
        if not self.ranks:
            raise ValueError("no matrix becomes low-rank; raise reduction or lower min_ratio")


def normalised(values: Tensor) -> Tensor:
    """Map singular values to [0, 1]; where all are the same, to rounding, none is small, and all become 1."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high - low > _FLAT * high else torch.ones_like(values)


def threshold(values: list[Tensor], reduction: float) -> float:
    """Return the threshold below which a share of all normalised singular values lies."""
    everything = torch.cat(values).sort().values
    return float(everything[floor(reduction * len(everything))])


def rank_of(values: Tensor, shape: torch.Size, tau: float, min_ratio: float) -> int | None:
    """Return the rank of a matrix, or `None` where it stays as it is.

    Args:
        values: its normalised singular values.
        shape: of the matrix.
        tau: threshold of those that are kept.
        min_ratio: share of dropped ones above which it becomes low-rank.
    """
    rank = int((values >= tau).sum())
    saves = rank * (shape[0] + shape[1]) < shape[0] * shape[1]
    return rank if saves and 1 - rank / len(values) > min_ratio else None


class WeloreLinear(ReplacedLinear):
    """A linear of two trained factors, or one that stays as it is."""

    TRAINED = ("a", "b")

    def start(self, config: WeloreConfig, site: Site) -> Mapping[str, Tensor]:
        """Truncate the weight, with the root of the singular values on both sides."""
        rank = config.ranks.get(site.key)
        if rank is None:
            return {}
        inputs, outputs = self.sizes
        if config.inference_mode:  # they will be read
            return {"a": torch.zeros(rank, inputs), "b": torch.zeros(outputs, rank)}
        u, s, v = torch.linalg.svd(self.base_weight, full_matrices=False)
        root = s[:rank].sqrt()
        return {"a": (root[:, None] * v[:rank]).contiguous(), "b": u[:, :rank] * root}

    def replaces(self, adapter: str) -> bool:
        """Tell whether the matrix became low-rank."""
        return self.has(adapter, "a")

    def product(self, adapter: str, x: Tensor) -> Tensor:
        """Return `B A x`."""
        return functional.linear(functional.linear(x, self.tensor(adapter, "a")), self.tensor(adapter, "b"))

    def whole(self, adapter: str) -> Tensor:
        """Return `B A`."""
        return self.tensor(adapter, "b") @ self.tensor(adapter, "a")


register("welore", WeloreConfig, WeloreLinear)
