"""TIES: trim each delta to its largest elements, elect a sign per element, merge what agrees with it.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023 (arXiv:2306.01708). The choices that
the field's tools make differently are mergekit's: trimming per tensor, a sign vote by weighted sum in which 0
counts as positive, and division by the sum of the agreeing weights.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import Cut, largest

TAKES = "deltas"
MODELS = (1, None)


class Params(MethodParams):
    """Parameters of `ties`.

    Attributes:
        weight: of each model's delta.
        density: share of each delta that is kept, the largest by magnitude; at least one element.
        scale: `lambda` in a spec; of the merged delta.
        normalize: divide by the sum of the weights that agree with the elected sign.
    """

    weight: tuple[float, ...] = (1.0,)
    density: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    scale: float = Field(1.0, alias="lambda")
    normalize: bool = True


def prepare(tensor: TensorStream, params: Params) -> list[Cut]:
    """Find what each model keeps."""
    return [largest(tensor, i, max(1, int(d * tensor.count))) for i, d in enumerate(params.density)]


def combine(x: Floats, params: Params, state: list[Cut], start: int) -> Floats:
    """Trim, elect and merge one chunk of deltas `[M, N]`."""
    for row, weight, cut in zip(x, params.weight, state, strict=True):
        cut.drop(row, start)
        np.multiply(row, np.float32(weight), out=row)
    # Adding 0 turns the sum -0 into 0, whose sign is the elected plus.
    sign = np.copysign(np.float32(1), x.sum(axis=0) + np.float32(0))
    merged, divisor = np.zeros_like(sign), np.zeros_like(sign)
    for row, weight in zip(x, params.weight, strict=True):
        agreeing = np.multiply(row, sign, out=row)
        np.maximum(agreeing, 0, out=agreeing)
        np.add(merged, agreeing, out=merged)
        np.add(divisor, np.multiply(agreeing > 0, np.float32(weight)), out=divisor)
    if params.normalize:
        np.divide(merged, divisor + (divisor == 0), out=merged)
    np.multiply(merged, sign, out=merged)
    return np.multiply(merged, np.float32(params.scale), out=merged)
