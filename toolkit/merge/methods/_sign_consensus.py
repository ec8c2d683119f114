"""What the methods share that elect a sign per element after they have sparsified the deltas in their own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import agree_on_signs, votes_of


class ConsensusParams(MethodParams):
    """Parameters of a merge by sign consensus.

    Attributes:
        weight: of each model's delta.
        scale: `lambda` in a spec; of the merged delta.
        normalize: divide the sum of what agrees by `divisor`.
        vote: for the sign of an element: `weighted` values, their `total` without weights, or `frequency` of signs.
        zero_vote: sign where the vote is 0: `plus`, or the `majority` of the tensor's elected signs.
        divisor: `weights` of the models that agree, or their `count`.
    """

    weight: tuple[float, ...] = (1.0,)
    scale: float = Field(1.0, alias="lambda")
    normalize: bool = False
    vote: Literal["weighted", "total", "frequency"] = "weighted"
    zero_vote: Literal["plus", "majority"] = "plus"
    divisor: Literal["weights", "count"] = "weights"


def sign_of_ties(tensor: TensorStream, params: ConsensusParams, drop: Callable[[Floats, int], Floats]) -> float:
    """Return the sign that is elected where the vote is 0; a majority takes a pass over the tensor.

    Args:
        tensor: of deltas.
        params: of the merge.
        drop: sparsifies a slice that begins at a flat index, and returns it as `[M, N]`.
    """
    if params.zero_vote == "plus":
        return 1.0
    balance = 0
    for start, x in tensor.stacked():
        balance += int(np.sign(votes_of(drop(x, start), params.weight, params.vote)).sum())
    return 1.0 if balance >= 0 else -1.0


def merge_by_consensus(x: Floats, params: ConsensusParams, zero: float) -> Floats:
    """Merge one slice of sparsified deltas `[M, N]`, which is overwritten, to `[N]`; `zero` wins a vote of 0."""
    divisor = params.divisor if params.normalize else "none"
    merged = agree_on_signs(x, params.weight, vote=params.vote, zero=zero, divisor=divisor)
    return np.multiply(merged, np.float32(params.scale), out=merged)
