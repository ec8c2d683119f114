"""Reinforced Agent Merging Plus, tensor by tensor: as `ram`, and what one model alone changed is made larger.

"Reinforced Agent Merging", 2026 (arXiv:2601.13572). Averaging shrinks what a model shares with others; to make up for
it, its own changes are multiplied by `1 + r * min(shared / own, alpha)`, with the numbers of elements of the tensor
that it changed with others and alone.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream
from toolkit.merge.methods._ram import RamParams, drop_unchanged, mean_of_changes
from toolkit.merge.ops import weighted_sum

TAKES = "deltas"
MODELS = (1, None)


class Params(RamParams):
    """Parameters of `ramplus_tl`: that of telling a change from none, and

    Attributes:
        r: how much larger a model's own changes become, times the ratio of its shared to its own changes.
        alpha: largest ratio that counts.
    """

    r: float = 0.1
    alpha: Annotated[float, Field(ge=0)] = 0.2


def prepare(tensor: TensorStream, params: Params) -> list[float]:
    """Return for each model the share that its own changes gain."""
    own, shared = np.zeros(tensor.num_models), np.zeros(tensor.num_models)
    for _, x in tensor.stacked():
        count = drop_unchanged(x, params.epsilon)
        alone = count == 1
        for i, row in enumerate(x):
            changed = row != 0
            changes = np.count_nonzero(changed)
            mine = np.count_nonzero(np.logical_and(changed, alone, out=changed))
            own[i] += mine
            shared[i] += changes - mine
    # A model without changes of its own has none to enlarge.
    return (params.r * np.minimum(shared / np.maximum(own, 1), params.alpha)).tolist()


def combine(x: Floats, params: Params, state: list[float], start: int) -> Floats:
    """Merge one slice of deltas `[M, N]`."""
    count = drop_unchanged(x, params.epsilon)
    merged = mean_of_changes(x, count)
    gain = weighted_sum(x, state)
    np.multiply(gain, count == 1, out=gain)
    return np.add(merged, gain, out=merged)
