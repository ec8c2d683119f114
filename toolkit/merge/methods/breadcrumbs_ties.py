"""Model Breadcrumbs with sign consensus: drop the outliers and the smallest elements, merge what agrees in sign.

With masks `m_i` as in `breadcrumbs` and `x_i = m_i * d_i`: `theta_0 + lambda * sum_i w_i x_i [sign x_i = s]` with
`s = sign(sum_i w_i x_i)`, divided by the weights of those that agree where `normalize` is set.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", 2023
(arXiv:2312.06795), merged as in Yadav et al., "TIES-Merging", 2023 (arXiv:2306.01708).
"""

from __future__ import annotations

from functools import partial
from math import prod

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream
from toolkit.merge.methods._breadcrumbs import Band, BreadcrumbsParams, bands, drop_all
from toolkit.merge.methods._sign_consensus import ConsensusParams, merge_by_consensus, sign_of_ties
from toolkit.merge.selection import search_bytes

TAKES = "deltas"
MODELS = (1, None)


class Params(BreadcrumbsParams, ConsensusParams):
    """Parameters of `breadcrumbs_ties`: those of dropping both ends, and those of a sign consensus."""


State = tuple[list[Band], float]


def prepare(tensor: TensorStream, params: Params) -> State:
    """Find what each model keeps, and the sign of elements without a vote."""
    found = bands(tensor, params)
    return found, sign_of_ties(tensor, params, partial(drop_all, found))


def combine(x: Floats, params: Params, state: State, start: int) -> Floats:
    """Drop both ends and merge one slice of deltas `[M, N]`."""
    found, zero = state
    return merge_by_consensus(drop_all(found, x, start), params, zero)


def memory(shape: tuple[int, ...], models: int) -> int:
    """Bound what finding the cuts takes."""
    return search_bytes(prod(shape), models, cuts=2)
