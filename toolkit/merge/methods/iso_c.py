"""Iso-C: give the sum of the task vectors the same length in all of its directions.

For a matrix with `sum_i tau_i = U diag(s) V^T` the merged delta is `mean(s) * U V^T`. Directions that no model
changes, whose singular value is 0, have no singular vectors of their own: they stay unchanged and do not count in the
mean. The authors' code fills them with the vectors that LAPACK happens to return; at full rank the two are equal.

Vectors are averaged, as the authors do. Tensors of more than two dimensions, which the authors average too, are
stacks of matrices here; `average` gives the authors' choice, and leaves out any tensor that a filter names.

Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", 2025
(arXiv:2502.04959).
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams
from toolkit.merge.ops import merge_matrices, svd_bytes, thin_svd

TAKES = "deltas"
MODELS = (1, None)
USES_ALL = True
SCOPE = "tensor"


class Params(MethodParams):
    """Parameters of `iso_c`.

    Attributes:
        weight: of each model's delta.
        scale: `lambda` in a spec; of the merged delta.
        average: take the mean of the deltas instead.
    """

    weight: tuple[float, ...] = (1.0,)
    scale: float = Field(1.0, alias="lambda")
    average: bool = False


def combine(x: Floats, params: Params, state: None, start: int) -> Floats:
    """Merge one tensor of deltas `[M, *shape]`."""
    return merge_matrices(x, params.weight, params.scale, None if params.average else _isotropic)


def memory(shape: tuple[int, ...], models: int) -> int:
    """Return an upper bound of the bytes that `combine` allocates."""
    if len(shape) < 2:
        return 4096
    rows, columns = shape[-2:]
    return svd_bytes(rows, columns) + 4 * (rows * columns + rows * min(rows, columns))


def _isotropic(matrices: Floats) -> Floats:
    """Sum up `[M, N, K]` and make all singular values of the sum their mean."""
    total = matrices[0]
    for matrix in matrices[1:]:
        np.add(total, matrix, out=total)
    if not total.any():
        return total
    u, s, vt = thin_svd(total)
    return (u * s.mean()) @ vt
