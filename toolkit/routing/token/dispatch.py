"""Rows to experts and back, with a capacity: the dispatch of a mixture in training.

Choices are placed in rounds, all first choices before all second ones; within a round in the order of the rows or, with
priorities, the largest first. A row that finds its expert full is dropped there: it gets nothing from it.

Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", 2022, arXiv:2206.03382; priorities from Riquelme et al.,
"Scaling Vision with Sparse Mixture of Experts", 2021, arXiv:2106.05974. Shape suffixes: T rows, k choices, E experts,
C places of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Where the choices of every row are computed.

    Attributes:
        index: `[T, k]`, expert of each choice.
        place: `[T, k]`, place inside the expert.
        num_experts: E.
        capacity: C; choices with a place beyond it are dropped.
    """

    index: Tensor
    place: Tensor
    num_experts: int
    capacity: int

    @property
    def kept(self) -> Tensor:
        """`[T, k]` bool."""
        return self.place < self.capacity

    @property
    def num_dropped(self) -> int:
        """Choices that found no place."""
        return int((~self.kept).sum())


def dispatch(index: Tensor, num_experts: int, capacity_factor: float = 0.0, priority: Tensor | None = None) -> Dispatch:
    """Place the choices of rows.

    Args:
        index: `[T, k]` int64, different experts in a row.
        num_experts: E.
        capacity_factor: `f` above 0 gives every expert `k int(f ceil(T / E))` places; 0 as many as are needed, so that
            nothing is dropped; below 0 as many as are needed, but at most what `-f` gives.
        priority: `[T]`, rows with a larger one go first in each round.
    """
    rows, k = index.shape
    order = torch.arange(rows, device=index.device) if priority is None else priority.argsort(descending=True)
    taken = index.new_zeros(num_experts)
    place = torch.empty_like(index)
    for choice in range(k):
        chosen = torch.nn.functional.one_hot(index[order, choice], num_experts)
        before = chosen.cumsum(0) - chosen + taken
        place[order, choice] = before.gather(1, index[order, choice, None])[:, 0]
        taken = taken + chosen.sum(0)
    needed = int(taken.max()) if rows else 0
    share = k * int(abs(capacity_factor) * math.ceil(rows / num_experts))
    capacity = needed if capacity_factor == 0 else share if capacity_factor > 0 else min(needed, share)
    return Dispatch(index, place, num_experts, capacity)


def encode(x_TK: Tensor, plan: Dispatch) -> Tensor:
    """Return the rows of every expert, `[E, C, K]`; places that nobody has are 0."""
    rows, choices = plan.kept.nonzero(as_tuple=True)
    places = (plan.index * plan.capacity + plan.place)[rows, choices]
    flat = x_TK.new_zeros(plan.num_experts * plan.capacity, x_TK.shape[1])
    return flat.index_copy(0, places, x_TK[rows]).view(plan.num_experts, plan.capacity, x_TK.shape[1])


def decode(outputs_ECN: Tensor, weight_Tk: Tensor, plan: Dispatch) -> Tensor:
    """Return the weighted sum of each row's outputs, `[T, N]`."""
    total = outputs_ECN.new_zeros(len(weight_Tk), outputs_ECN.shape[2])
    for choice in range(weight_Tk.shape[1]):
        kept = plan.kept[:, choice].nonzero()[:, 0]
        own = outputs_ECN[plan.index[kept, choice], plan.place[kept, choice]]
        total = total.index_add(0, kept, weight_Tk[kept, choice, None].to(own.dtype) * own)
    return total


def mix(x_TK: Tensor, weight_Tk: Tensor, plan: Dispatch, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Run every expert on its rows; return the weighted sums, `[T, N]`."""
    rows_ECK = encode(x_TK, plan)
    return decode(torch.stack([expert(rows) for expert, rows in zip(experts, rows_ECK, strict=True)]), weight_Tk, plan)


def balance_loss(logits_TE: Tensor, index: Tensor) -> Tensor:
    """Return `E sum_e f_e p_e`: share of first choices times mean probability; 1 where both are even.

    Fedus et al., "Switch Transformers", 2021, arXiv:2101.03961.
    """
    count = logits_TE.shape[1]
    shares = torch.nn.functional.one_hot(index[:, 0], count).to(logits_TE.dtype).mean(0)
    return count * (shares * torch.softmax(logits_TE, dim=1).mean(0)).sum()
