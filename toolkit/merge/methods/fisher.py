"""Fisher merging: average of the models' weights, each weight by how much its model's data depends on it.

`sum_i w_i F_i theta_i / sum_i w_i F_i` element by element, `F_i` the diagonal Fisher information of model i on its own
data: the mean over examples of the squared gradient of the log-likelihood. Where no model's is above 0, the weights are
averaged by `w_i`.

Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", 2021 (arXiv:2111.09832).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import inner, weighted_sum

TAKES = "weights"
MODELS = (1, None)
USES_ALL = True
STATISTICS = "fisher"


class Params(MethodParams):
    """Parameters of `fisher`.

    Attributes:
        weight: of each model.
        normalize: divide each model's Fisher information by its norm over the whole model, so that none counts for
            more because its data is harder.
        floor: smallest Fisher information of an element; the paper's code has 1e-6.
    """

    weight: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)
    normalize: bool = False
    floor: float = Field(0.0, ge=0)


State = tuple[TensorStream, Sequence[float]]


def survey(tensors: Sequence[tuple[TensorStream, Params]]) -> list[list[float] | None]:
    """Return for each tensor by what each model's Fisher information is multiplied."""
    if not any(params.normalize for _, params in tensors):
        return [None] * len(tensors)
    squares = sum((_squares(tensor) for tensor, _ in tensors), np.zeros(tensors[0][0].num_models))
    factors = [1 / float(s) ** 0.5 if s else 1.0 for s in squares]
    return [factors if params.normalize else None for _, params in tensors]


def _squares(tensor: TensorStream) -> np.ndarray:
    found = np.zeros(tensor.num_models)
    if tensor.statistics is None:
        return found
    for start, stop in chunks(tensor.shape):
        wide = tensor.statistics.read(start, stop).astype(np.float64)
        found += [inner(row, row) for row in wide]
    return found


def prepare(tensor: TensorStream, params: Params) -> State:
    """Return the tensor, whose statistics are read slice by slice, and the factor of each model's."""
    return tensor, tensor.surveyed or [1.0] * tensor.num_models


def combine(x: Floats, params: Params, state: State, start: int) -> Floats:
    """Average one chunk `[M, N]`."""
    tensor, factors = state
    total = sum(params.weight)
    shares = [weight / total for weight in params.weight] if total else [1 / len(x)] * len(x)
    if tensor.statistics is None:
        return weighted_sum(x, shares)
    fisher = tensor.statistics.read(start, start + x.shape[1])
    for row, factor, share in zip(fisher, factors, shares, strict=True):
        np.multiply(row, np.float32(factor), out=row)
        np.maximum(row, np.float32(params.floor), out=row)
        np.multiply(row, np.float32(share), out=row)
    # Of the largest, so that neither the sum nor the products leave float32.
    largest = fisher.max(axis=0)
    known = largest > 0
    np.divide(fisher, np.where(known, largest, 1), out=fisher)
    for row, share in zip(fisher, shares, strict=True):
        np.copyto(row, np.float32(share), where=~known)
    divisor = fisher.sum(axis=0)
    for row, weight in zip(x, fisher, strict=True):
        np.multiply(row, weight, out=row)
    merged = x.sum(axis=0)
    return np.divide(merged, divisor, out=merged)
