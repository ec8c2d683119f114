"""Sums of logits, and how far distributions are from each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def fused(large: Tensor, directions: Tensor, alpha: Tensor) -> Tensor:
    """Return `large + sum_t alpha_t * direction_t`, `[B, V]`.

    Args:
        large: `[B, V]` logits.
        directions: `[T, B, V]`, an expert's logits less those of the small base.
        alpha: `[B, T]`.
    """
    return large + (alpha.T[:, :, None] * directions).sum(dim=0)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return `KL(p || q)` in nats over the last dimension; tokens that `p` excludes count nothing."""
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0).sum(dim=-1)
