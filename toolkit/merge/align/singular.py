"""How far the singular vectors of two models point the same way."""

from __future__ import annotations

import numpy as np

from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.dtypes import Floats
from toolkit.checkpoints.layout import layer_of
from toolkit.checkpoints.reader import Checkpoint
from toolkit.merge.svd import singular_values


def singular_alignment(reference: Checkpoint, *others: Checkpoint) -> list[float]:
    """Measure how well the singular vectors of the matrices of all layers agree with a reference's.

    With `A = sum_i s_i u_i v_i'` and `B = sum_j t_j x_j y_j'`, it is
    `sum_ij s_i t_j (u_i . x_j) (v_i . y_j) / sum_i s_i t_i`, numerator and denominator added up over all matrices.
    Permutations leave the denominator alone. It is at most 1 (von Neumann's trace inequality), which is reached where
    all singular vectors are the same, and the numerator is no other than `<A, B>`.

    Args:
        reference: with `A`.
        others: with `B`; models that are permutations of each other.

    Returns:
        one value per model of `others`.
    """
    inner, most = np.zeros(len(others)), 0.0
    for name, info in reference.tensors.items():
        if len(info.shape) != 2 or layer_of(name) is None:
            continue
        a, matrices = _matrix(reference, name), [_matrix(other, name) for other in others]
        most += float(singular_values(a) @ singular_values(matrices[0]))
        inner += [float(np.vdot(a.astype(np.float64), b.astype(np.float64))) for b in matrices]
    return [float(value) / most if most else 0.0 for value in inner]


def _matrix(checkpoint: Checkpoint, name: str) -> Floats:
    info = checkpoint.info(name)
    out = np.empty(info.count, np.float32)
    for start, stop in chunks(info.shape):
        checkpoint.read(name, start, stop, out[start:stop])
    return out.reshape(info.shape)
