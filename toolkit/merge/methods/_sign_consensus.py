"""What the methods share that elect a sign per element after they have sparsified the deltas in their own way."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams
from toolkit.merge.ops import agree_on_signs


class ConsensusParams(MethodParams):
    """Parameters of a merge by sign consensus; where the vote is 0, plus is elected.

    Attributes:
        weight: of each model's delta.
        scale: `lambda` in a spec; of the merged delta.
        normalize: divide the sum of what agrees by `divisor`.
        vote: for the sign of an element: `weighted` values, their `total` without weights, or `frequency` of signs.
        divisor: `weights` of the models that agree, or their `count`.
    """

    weight: tuple[float, ...] = (1.0,)
    scale: float = Field(1.0, alias="lambda")
    normalize: bool = False
    vote: Literal["weighted", "total", "frequency"] = "weighted"
    divisor: Literal["weights", "count"] = "weights"


def merge_by_consensus(x: Floats, params: ConsensusParams) -> Floats:
    """Merge one slice of sparsified deltas `[M, N]`, which is overwritten, to `[N]`."""
    divisor = params.divisor if params.normalize else "none"
    merged = agree_on_signs(x, params.weight, vote=params.vote, divisor=divisor)
    return np.multiply(merged, np.float32(params.scale), out=merged)
