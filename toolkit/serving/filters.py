"""The distribution that a request draws from: temperature, top-k, top-p and min-p, in transformers' order.

B: requests, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from toolkit.serving.request import Sampling


def probabilities(logits_BV: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Return the distributions that requests draw from.

    Each filter sees what the one before it left, normalised anew: temperature, top-k, top-p (Holtzman et al., "The
    Curious Case of Neural Text Degeneration", 2020, arXiv:1904.09751), min-p (Nguyen et al., "Turning Up the Heat",
    2024, arXiv:2407.01082). A row depends on no other row.

    Args:
        logits_BV: after bias and penalties; -inf is a token that cannot come.
        samplings: one per row, none of them greedy.

    Returns:
        `[B, V]`, rows of sum 1 in the dtype of the logits.
    """
    logits_BV = logits_BV / _column(logits_BV, [s.temperature for s in samplings])
    logits_BV = _keep_top_k(logits_BV, [s.top_k for s in samplings])
    weights_BV = torch.softmax(logits_BV, dim=-1)
    weights_BV = _keep_top_p(weights_BV, [s.top_p for s in samplings])
    return _keep_min_p(weights_BV, [s.min_p for s in samplings])


def _column(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _keep_top_k(logits_BV: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """Keep what is as likely as the k-th most likely token, or more; 0 keeps all."""
    size = logits_BV.shape[-1]
    counts = [k if 0 < k < size else 0 for k in top_k]
    if not any(counts):
        return logits_BV
    best = torch.topk(logits_BV, max(counts), dim=-1).values
    at = torch.tensor([max(k - 1, 0) for k in counts], device=logits_BV.device).unsqueeze(1)
    unfiltered = torch.tensor([k == 0 for k in counts], device=logits_BV.device).unsqueeze(1)
    cut = best.gather(1, at).masked_fill(unfiltered, -torch.inf)
    return logits_BV.masked_fill(logits_BV < cut, -torch.inf)


def _keep_top_p(weights_BV: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """Keep the fewest tokens that hold `top_p` of the probability; only rows that ask for it are sorted."""
    rows = [i for i, p in enumerate(top_p) if p < 1]
    if not rows:
        return weights_BV
    ordered, order = torch.sort(weights_BV[rows], dim=-1, descending=True, stable=True)
    # A token stays if what comes before it does not reach top_p; the first always stays.
    before = torch.cumsum(ordered, dim=-1) - ordered
    beyond = before >= _column(ordered, [top_p[i] for i in rows])
    beyond[:, 0] = False
    kept = torch.zeros_like(ordered).scatter(1, order, ordered.masked_fill(beyond, 0))
    filtered = weights_BV.clone()
    filtered[rows] = kept / kept.sum(dim=-1, keepdim=True)
    return filtered


def _keep_min_p(weights_BV: torch.Tensor, min_p: Sequence[float]) -> torch.Tensor:
    """Keep what is at least `min_p` times as likely as the most likely token."""
    rows = [i for i, p in enumerate(min_p) if p > 0]
    if not rows:
        return weights_BV
    own = weights_BV[rows]
    cut = own.amax(dim=-1, keepdim=True) * _column(own, [min_p[i] for i in rows])
    kept = own.masked_fill(own < cut, 0)
    filtered = weights_BV.clone()
    filtered[rows] = kept / kept.sum(dim=-1, keepdim=True)
    return filtered
