"""DELLA without sign consensus: drop elements of each delta at random, small ones more often, add up the rest.

With masks `b_i` and factors `r_i` as in `della`: `theta_0 + lambda * sum_i w_i r_i b_i * d_i`.

Deep, Bhardwaj and Poria, "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
2024 (arXiv:2406.11617), without its election of signs; see `della` for the ranks and the rescaling.
"""

from __future__ import annotations

from math import prod

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream
from toolkit.merge.methods import task_arithmetic
from toolkit.merge.methods._della import DellaParams, RankedMask, drop_all, masks
from toolkit.merge.methods._remembered import remembered_bytes

TAKES = "deltas"
MODELS = (1, None)
SCOPE = "row"


class Params(DellaParams, task_arithmetic.Params):
    """Parameters of `della_linear`: those of dropping by rank, and those of `task_arithmetic`."""


def prepare(tensor: TensorStream, params: Params) -> list[RankedMask]:
    """Return the mask of each model."""
    return masks(tensor, params)


def combine(x: Floats, params: Params, state: list[RankedMask], start: int) -> Floats:
    """Drop, rescale and add up whole rows of deltas `[M, R, K]`."""
    return task_arithmetic.combine(drop_all(state, x, start), params, None, start).reshape(x.shape[1:])


def memory(shape: tuple[int, ...], models: int) -> int:
    """Return what the masks take that one pass makes and the next one needs."""
    return remembered_bytes(prod(shape) * models)
