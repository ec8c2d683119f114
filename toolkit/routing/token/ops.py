"""Arithmetic that token routers share. Shape suffixes: T rows, K input features, E experts, k chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

Choice = tuple[Tensor, Tensor]
"""Chosen experts, `[T, k]` int64, and their weights, `[T, k]` float32."""

BLOCK = 16


def products(x_TK: Tensor, vectors_EK: Tensor) -> Tensor:
    """Return `x @ vectors.T`, `[T, E]`, whose columns do not depend on how many experts there are.

    Products of other shapes are rounded in another way, so vectors are taken in blocks of one size, the last padded
    with zeros: a new expert changes no bit of the scores of the others.
    """
    count = len(vectors_EK)
    padded = functional.pad(vectors_EK, (0, 0, 0, -count % BLOCK))
    return torch.cat([x_TK @ block.T for block in padded.split(BLOCK)], dim=1)[:, :count]


def top_softmax(scores_TE: Tensor, top_k: int, temperature: float = 1.0) -> Choice:
    """Return the experts with the largest scores, and the softmax over these alone."""
    values, index = scores_TE.topk(min(top_k, scores_TE.shape[1]), dim=1)
    return index, torch.softmax(values / temperature, dim=1)


def standardized(x: Tensor) -> Tensor:
    """Return the rows with mean 0 and variance 1; rows that are constant become 0."""
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return centred / deviation.clamp_min(1e-12)
