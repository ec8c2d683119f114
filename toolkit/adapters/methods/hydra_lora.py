"""Hydra: a parallel and a sequential low-rank branch on one linear layer.

`y = W0 x + b0 + s B_p A_p x + s B_s A_s (W0 x + b0)`: the parallel branch learns new features, the sequential one
combines those that the base has. Folded, `W = W0 + s (W_p + W_s W0)` and `b = b0 + s W_s b0`, so that the change
belongs to this base alone.

Kim et al., "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", 2023, arXiv:2309.06922. (Not
the state-space Hydra.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.adapters.methods._base import AdapterConfig, AdapterLayer, LowRank, Site, WeightChange, register, uniform
from toolkit.errors import UnsupportedError


@dataclass
class HydraConfig(AdapterConfig):
    """Hydra.

    Attributes:
        parallel_rank: of the branch on the input; 0 leaves it out.
        sequential_rank: of the branch on the base's output; 0 leaves it out.
        scale: `s`, of both branches.
        dropout: of what enters a branch, in training.
    """

    parallel_rank: int = 4
    sequential_rank: int = 4
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.parallel_rank, self.sequential_rank) < 0 or not self.parallel_rank + self.sequential_rank:
            raise ValueError("parallel_rank and sequential_rank are at least 0, and one of them above it")


class HydraLinear(AdapterLayer):
    """A linear with two low-rank branches."""

    TRAINED = ("parallel_a", "parallel_b", "sequential_a", "sequential_b")

    def start(self, config: HydraConfig, site: Site) -> Mapping[str, Tensor]:
        """Draw both A's; both B's are zero."""
        inputs, outputs = self.sizes
        tensors: dict[str, Tensor] = {}
        for branch, rank, width in (
            ("parallel", config.parallel_rank, inputs),
            ("sequential", config.sequential_rank, outputs),
        ):
            if rank:
                tensors[f"{branch}_a"] = uniform((rank, width), fan_in=width)
                tensors[f"{branch}_b"] = torch.zeros(outputs, rank)
        return tensors

    def change(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `s (B_p A_p x + B_s A_s y)`."""
        config = self.configs[adapter]
        total = y.new_zeros(())
        for branch, values in (("parallel", x), ("sequential", y)):
            if self.has(adapter, f"{branch}_a"):
                a, b = self.tensor(adapter, f"{branch}_a"), self.tensor(adapter, f"{branch}_b")
                total = total + functional.linear(
                    functional.linear(functional.dropout(values, config.dropout, self.training), a), b
                )
        return total * config.scale

    def low_rank(self, adapter: str) -> LowRank:
        """Return both branches as one pair: `[A_p; A_s W0]` and `[B_p, B_s]`.

        Raises:
            UnsupportedError: the base has a bias, which the sequential branch changes too.
        """
        if self.base_bias is not None and self.has(adapter, "sequential_a"):
            raise UnsupportedError("hydra_lora changes biases too and cannot be written as LoRA; merge it instead")
        return self._pair(adapter)

    def fold(self, adapter: str) -> WeightChange:
        """Return `s (W_p + W_s W0)` and `s W_s b0`."""
        a, b, scale = self._pair(adapter)
        bias = self.base_bias
        if bias is None or not self.has(adapter, "sequential_a"):
            return WeightChange(scale * (b @ a))
        inner = self.tensor(adapter, "sequential_a").float() @ bias
        return WeightChange(scale * (b @ a), scale * (self.tensor(adapter, "sequential_b").float() @ inner))

    def _pair(self, adapter: str) -> LowRank:
        rows, columns = [], []
        if self.has(adapter, "parallel_a"):
            rows.append(self.tensor(adapter, "parallel_a").float())
            columns.append(self.tensor(adapter, "parallel_b").float())
        if self.has(adapter, "sequential_a"):
            rows.append(self.tensor(adapter, "sequential_a").float() @ self.base_weight)
            columns.append(self.tensor(adapter, "sequential_b").float())
        return LowRank(torch.cat(rows), torch.cat(columns, dim=1), self.configs[adapter].scale)


register("hydra_lora", HydraConfig, HydraLinear)
