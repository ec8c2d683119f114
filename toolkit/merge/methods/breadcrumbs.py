"""Model Breadcrumbs: drop the outliers and the smallest elements of each delta, add up what remains.

`theta_0 + lambda * sum_i w_i m_i * d_i`, where `m_i` is 0 at the `gamma` largest elements of `d_i` by magnitude, 1 at
the `density` of elements that follow, and 0 at the rest.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", 2023
(arXiv:2312.06795). Both cuts are exact, and among equal magnitudes the first elements count as the larger ones.
"""

from __future__ import annotations

from math import prod

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream
from toolkit.merge.methods import task_arithmetic
from toolkit.merge.methods._breadcrumbs import Band, BreadcrumbsParams, bands, drop_all
from toolkit.merge.selection import search_bytes

TAKES = "deltas"
MODELS = (1, None)


class Params(BreadcrumbsParams, task_arithmetic.Params):
    """Parameters of `breadcrumbs`: those of dropping both ends, and those of `task_arithmetic`."""


def prepare(tensor: TensorStream, params: Params) -> list[Band]:
    """Find what each model keeps."""
    return bands(tensor, params)


def combine(x: Floats, params: Params, state: list[Band], start: int) -> Floats:
    """Drop both ends and add up one slice of deltas `[M, N]`."""
    return task_arithmetic.combine(drop_all(state, x, start), params, None, start)


def memory(shape: tuple[int, ...], models: int) -> int:
    """Bound what finding the cuts takes."""
    return search_bytes(prod(shape), models, cuts=2)
