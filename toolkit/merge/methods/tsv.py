"""TSV-M: merge the strongest singular directions of each task, after making those of all tasks orthogonal.

Of each of the T task vectors `tau_i = U_i diag(s_i) V_i^T` the first `1 / T` of the rank is kept. The left vectors of
all tasks, side by side, are replaced by the nearest matrix with orthonormal columns (orthogonal Procrustes: `P Q^T`
for an SVD `P diag(z) Q^T`), the right ones likewise, and the merged delta is `U diag(s) V^T` with all `s` kept.

Directions that two tasks share are dependent columns, to which no orthonormal ones are nearest. They are spread over
the tasks that have them, and equal tasks then give what one of them gives. The authors' code fills the gap with the
vectors that LAPACK happens to return, as it does for tasks of a rank below `1 / T`. Where the columns are independent
the two are equal.

Vectors are averaged, as the authors do. Tensors of more than two dimensions, which the authors average too, are
stacks of matrices here; `average` gives the authors' choice, and leaves out any tensor that a filter names.

Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", 2024 (arXiv:2412.00081).
"""

from __future__ import annotations

from functools import partial

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
    """Parameters of `tsv`.

    Attributes:
        weight: of each model's delta.
        scale: `lambda` in a spec, the paper's alpha; of the merged delta.
        keep: share of the rank that each model keeps, at least one direction; 1 / number of models where not given.
        average: take the mean of the deltas instead.
    """

    weight: tuple[float, ...] = (1.0,)
    scale: float = Field(1.0, alias="lambda")
    keep: float | None = Field(None, gt=0, le=1)
    average: bool = False


def combine(x: Floats, params: Params, state: None, start: int) -> Floats:
    """Merge one tensor of deltas `[M, *shape]`."""
    merge = None if params.average else partial(_merge, keep=params.keep)
    return merge_matrices(x, params.weight, params.scale, merge)


def memory(shape: tuple[int, ...], models: int) -> int:
    """Return an upper bound of the bytes that `combine` allocates, whatever share of the rank is kept."""
    if len(shape) < 2:
        return 4096
    rows, columns = shape[-2:]
    kept = models * min(rows, columns)
    # The kept vectors twice, while they are put side by side and while they are multiplied.
    factors = 8 * kept * (rows + columns + 1) + 4 * rows * columns
    return factors + max(svd_bytes(rows, columns), svd_bytes(rows, kept), svd_bytes(kept, columns))


def _merge(matrices: Floats, keep: float | None) -> Floats:
    """Merge `[M, N, K]` to `[N, K]`."""
    rank = min(matrices.shape[1:])
    count = max(1, rank // len(matrices) if keep is None else int(keep * rank))
    u, s, vt = _strongest(matrices, count)
    left = orthonormal(u)
    return np.multiply(left, s, out=left) @ orthonormal(vt)


def _strongest(matrices: Floats, count: int) -> tuple[Floats, Floats, Floats]:
    """Return the first `count` singular triples of each matrix, side by side: `[N, R]`, `[R]`, `[R, K]`."""
    triples = [(u[:, :count].copy(), s[:count], vt[:count].copy()) for u, s, vt in map(thin_svd, matrices)]
    us, values, vts = zip(*triples, strict=True)
    return np.concatenate(us, axis=1), np.concatenate(values), np.concatenate(vts)


def orthonormal(vectors: Floats) -> Floats:
    """Return the matrix nearest to `vectors` whose rows, or columns, are orthonormal in the space that they span."""
    u, _, vt = thin_svd(vectors)
    return u @ vt
