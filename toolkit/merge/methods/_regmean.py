"""What `regmean` and `regmean_plus` share: the weights whose outputs are nearest to those of all models."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import weighted_sum


class RegMeanParams(MethodParams):
    """Parameters of regression means.

    Attributes:
        weight: of each model's data.
        alpha: factor of the inner products of different inputs; 1 is least squares as it is, 0 weighs inputs alone.
        ridge: added to the inner products of each input with itself, as a share of their mean over inputs and models;
            it draws directions that no data has to the average of the models.
    """

    weight: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)
    alpha: float = Field(0.9, ge=0, le=1)
    ridge: float = Field(1e-6, ge=0)


def prepare(tensor: TensorStream, params: RegMeanParams) -> TensorStream:
    """Return the tensor, whose statistics are read when it is merged."""
    return tensor


def combine(x: Floats, params: RegMeanParams, tensor: TensorStream, start: int) -> Floats:
    """Return `(sum_i w_i G_i)^-1 sum_i w_i G_i W_i` of linear weights `x` `[M, *shape]`, else their weighted mean.

    Solved in float64. `G_i` `[K, K]` are the inner products of what enters the layer in model i.
    """
    total = sum(params.weight)
    shares = [weight / total for weight in params.weight] if total else [1 / len(x)] * len(x)
    if tensor.statistics is None:
        return weighted_sum(x.reshape(len(x), -1), shares).reshape(x.shape[1:])
    grams = tensor.statistics.whole()
    ridge = params.ridge * float(np.mean([np.trace(gram, dtype=np.float64) / len(gram) for gram in grams]))
    left = np.zeros(grams.shape[1:])
    right = np.zeros((grams.shape[1], x.shape[2 if tensor.statistics.transposed else 1]))
    for weights, gram, share in zip(x, grams, shares, strict=True):
        scaled = _scaled(gram, params.alpha, ridge)
        scaled *= share
        left += scaled
        right += scaled @ (weights if tensor.statistics.transposed else weights.T)
    if not left.any():
        return weighted_sum(x.reshape(len(x), -1), shares).reshape(x.shape[1:])
    merged = _solve(left, right)
    return (merged if tensor.statistics.transposed else merged.T).astype(np.float32)


def _scaled(gram: Floats, alpha: float, ridge: float) -> NDArray[np.float64]:
    wide = gram.astype(np.float64)
    diagonal = wide.diagonal().copy()
    wide *= alpha
    np.fill_diagonal(wide, diagonal + ridge)
    return wide


def _solve(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[Any]:
    try:
        return np.linalg.solve(left, right)
    except np.linalg.LinAlgError:  # inputs that no data has, and no ridge
        return np.linalg.lstsq(left, right, rcond=None)[0]


def memory(shape: tuple[int, ...], models: int) -> int:
    """Bound what `combine` allocates: inner products in float32, two in float64, and both sides."""
    if len(shape) != 2:
        return 0
    inputs, outputs = max(shape), min(shape)
    square = max(inputs, outputs) ** 2
    return 4 * models * square + 8 * 4 * square + 8 * 4 * inputs * outputs
