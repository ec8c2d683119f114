"""DELLA: drop elements of each delta at random, small ones more often, merge what agrees in sign.

The element with rank `j` of the `n` of its row, from 0 for the smallest, is kept with probability
`density - epsilon + 2 epsilon j / (n - 1)`. Of what is kept, made larger, the merge is that of `ties`.

Deep, Bhardwaj and Poria, "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
2024 (arXiv:2406.11617). Ranks are taken within rows, the last dimension of a tensor. The paper divides each element
that is kept by its probability; mergekit keeps the tensor's L1 norm instead.
"""

from __future__ import annotations

from math import prod

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream
from toolkit.merge.methods._della import DellaParams, RankedMask, drop_all, masks
from toolkit.merge.methods._remembered import remembered_bytes
from toolkit.merge.methods._sign_consensus import ConsensusParams, merge_by_consensus, sign_of_ties

TAKES = "deltas"
MODELS = (1, None)
SCOPE = "row"


class Params(DellaParams, ConsensusParams):
    """Parameters of `della`: those of dropping by rank, and those of a sign consensus."""

    normalize: bool = True


State = tuple[list[RankedMask], float]


def prepare(tensor: TensorStream, params: Params) -> State:
    """Return the mask of each model, and the sign of elements without a vote."""
    found, width = masks(tensor, params), tensor.shape[-1] if tensor.shape else 1

    def drop(x: Floats, start: int) -> Floats:
        return drop_all(found, x.reshape(len(x), -1, width), start)

    return found, sign_of_ties(tensor, params, drop)


def combine(x: Floats, params: Params, state: State, start: int) -> Floats:
    """Drop, rescale and merge whole rows of deltas `[M, R, K]`."""
    found, zero = state
    return merge_by_consensus(drop_all(found, x, start), params, zero).reshape(x.shape[1:])


def memory(shape: tuple[int, ...], models: int) -> int:
    """Return what the masks take that one pass makes and the next one needs."""
    return remembered_bytes(prod(shape) * models)
