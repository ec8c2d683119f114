"""The specification: one step after the other, each on whole rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from toolkit.kernels.merge_elementwise.api import BLOCK, KeptAtRandom, KeptLargest, Vote


def merge_elementwise(
    x_MN: torch.Tensor,
    weights: Sequence[float],
    kept: KeptLargest | KeptAtRandom | None,
    vote: Vote | None,
    scale: float,
    base_N: torch.Tensor | None,
    start: int,
) -> torch.Tensor:
    """See the api."""
    rows = [row.to(torch.promote_types(row.dtype, torch.float32)) for row in x_MN]
    if isinstance(kept, KeptLargest):
        rows = [_largest(row, kept, i, start) for i, row in enumerate(rows)]
    elif kept is not None:
        rows = [row * _drawn(kept, i, start, row) * kept.factors[i] for i, row in enumerate(rows)]
    if vote is not None:
        merged = _agreeing(rows, weights, vote)
    elif len(set(weights)) == 1:
        merged = _sum(rows) * weights[0]
    else:
        merged = _sum([row * weight for row, weight in zip(rows, weights, strict=True)])
    merged = merged * scale
    return merged if base_N is None else merged + base_N.to(merged.dtype)


def _largest(row_N: torch.Tensor, kept: KeptLargest, model: int, start: int) -> torch.Tensor:
    """Drop what is below the threshold of a model."""
    bits, threshold = row_N.float().view(torch.int32).long() & 0x7FFFFFFF, kept.thresholds[model]
    places = torch.arange(start, start + len(row_N), device=row_N.device)
    return row_N * ((bits > threshold) | ((bits == threshold) & (places <= kept.lasts[model])))


def _drawn(kept: KeptAtRandom, model: int, start: int, like_N: torch.Tensor) -> torch.Tensor:
    """Tell which elements of a model are kept at random."""
    places = torch.arange(start, start + len(like_N), device=like_N.device)
    stride, offset = (kept.keys_MB2[model].long() & 0xFFFFFFFF)[places // BLOCK - start // BLOCK].T
    word = (places % BLOCK * stride + offset) & 0xFFFFFFFF
    # 64 bits overflow here, but only above the 32 that are looked at.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = (word ^ word >> shift) * factor & 0xFFFFFFFF
    return word ^ word >> 16 < kept.limits[model]


def _agreeing(rows: list[torch.Tensor], weights: Sequence[float], vote: Vote) -> torch.Tensor:
    """Elect a sign per element and add up what has it, weighted."""
    weighted = [row * weight for row, weight in zip(rows, weights, strict=True)]
    ballots = {"weighted": weighted, "total": rows, "frequency": [torch.sign(row) for row in rows]}[vote.by]
    votes = _sum(ballots)
    sign = torch.sign(votes) + (votes == 0) * vote.zero
    agreeing = [torch.clamp_min(value * sign, 0) for value in weighted]
    merged = _sum(agreeing)
    if vote.divisor != "none":
        shares = weights if vote.divisor == "weights" else [1.0] * len(rows)
        divisor = _sum([(value != 0) * share for value, share in zip(agreeing, shares, strict=True)])
        merged = merged / (divisor + (divisor == 0))
    return merged * sign


def _sum(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total
