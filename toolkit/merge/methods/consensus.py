"""Consensus Merging: keep of a multi-task vector only what enough tasks need.

With `tau` the sum of the task vectors, or their TIES merge, the TALL mask of task t is

    |tau_t| > mask_lambda_t * |tau - tau_t|

element by element: the weights at which the merged model is nearer to the task than the base is. A weight that fewer
than `k` masks hold becomes the base's. `k: 2` removes weights that one task alone needs ("selfish") and those that
none does ("catastrophic"), `k: 1` the latter; `k: 0` is task arithmetic, or TIES; with more than there are tasks
nothing is left but the base. The comparison is with the unscaled vector; `lambda` scales what is kept.

The authors pick `mask_lambda` per task from 0.2, 0.3, 0.4, 0.5 and 0.6 by validation accuracy. Without data the
default is the middle of those. All tensors are masked, norms and embeddings too, as in their code; `k: 0` under a
filter exempts some.

Wang et al., "Localizing Task Information for Improved Model Merging and Compression", 2024 (arXiv:2405.07813).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.methods import ties
from toolkit.merge.ops import weighted_sum

TAKES = "deltas"
MODELS = (1, None)


class Params(MethodParams):
    """Parameters of `consensus`.

    Attributes:
        weight: of each model's delta; what is said above of a task vector is said of the weighted one.
        scale: `lambda` in a spec; of the merged delta.
        k: masks that must hold an element for it to be kept.
        mask_lambda: of each model; the larger, the smaller its mask.
        aggregate: the multi-task vector is the `sum` of the deltas, or their merge by `ties` with the choices of its
            paper, summed and not averaged.
        density: share of each delta that `ties` keeps.
        trim: what `ties` keeps it of: each `tensor`, or the whole `model`.
    """

    weight: tuple[float, ...] = (1.0,)
    scale: float = Field(1.0, alias="lambda")
    k: int = Field(2, ge=0)
    mask_lambda: tuple[Annotated[float, Field(ge=0)], ...] = (0.4,)
    aggregate: Literal["sum", "ties"] = "sum"
    density: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.2,)
    trim: Literal["tensor", "model"] = "model"


State = tuple[ties.Params, ties.State] | None


def survey(tensors: Sequence[tuple[TensorStream, Params]]) -> Sequence[object]:
    """Find what TIES keeps of the whole model, of the tensors that are merged so."""
    return ties.survey([(tensor, _ties(params)) for tensor, params in tensors])


def prepare(tensor: TensorStream, params: Params) -> State:
    """Return how TIES merges a tensor, where it takes part."""
    if params.aggregate == "sum":
        return None
    choices = _ties(params)
    return choices, ties.prepare(tensor, choices)


def combine(x: Floats, params: Params, state: State, start: int) -> Floats:
    """Merge one slice of deltas `[M, N]`."""
    factors = coefficients(params)
    if factors is not None:
        return weighted_sum(x, factors)
    merged = None if state is None else ties.combine(x.copy(), *state, start)
    for row, weight in zip(x, params.weight, strict=True):
        np.multiply(row, np.float32(weight), out=row)
    if merged is None:
        merged = x.sum(axis=0)
    kept = np.zeros(merged.shape, np.int32, like=x)
    for row, mask_lambda in zip(x, params.mask_lambda, strict=True):
        np.add(kept, tall_mask(row, merged, mask_lambda), out=kept)
    np.multiply(merged, kept >= params.k, out=merged)
    return np.multiply(merged, np.float32(params.scale), out=merged)


def coefficients(params: Params, state: object = None) -> list[float] | None:
    """Return the factor of each model's delta where nothing is masked nor trimmed."""
    if params.k or params.aggregate == "ties":
        return None
    return [params.scale * weight for weight in params.weight]


def tall_mask(delta: Floats, merged: Floats, mask_lambda: float) -> NDArray[np.bool_]:
    """Return where a task vector `[N]` is larger than its distance from the multi-task vector `[N]`."""
    distance = np.subtract(merged, delta)
    np.multiply(np.abs(distance, out=distance), np.float32(mask_lambda), out=distance)
    return np.abs(delta) > distance


def _ties(params: Params) -> ties.Params:
    """Return the parameters that TIES has here; of the whole model only where it takes part."""
    trim = params.trim if params.aggregate == "ties" else "tensor"
    given = {"weight": params.weight, "density": params.density, "normalize": False, "trim": trim}
    return ties.Params.model_validate({"preset": "paper", **given})
