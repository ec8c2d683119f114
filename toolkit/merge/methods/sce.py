"""SCE: select the elements that differ most between models, weigh models by their energy, erase minority signs.

With `x_i` the selected elements of the deltas, `w_i = |x_i|^2 / sum_k |x_k|^2` and `s = sign(sum_i x_i)`:
`theta_0 + sum_i w_i x_i [sign x_i = s] / sum_i w_i [sign x_i = s]`.

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024 (arXiv:2408.07990). Of each tensor the elements whose
variance across models is largest are selected; a model's weight is its mean square over them, as a share of all
models'; signs are elected by the unweighted sum, and the weights of the models that agree are made to sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import frexp, prod
from typing import Annotated

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import agree_on_signs, inner
from toolkit.merge.selection import Cut, largest, search_bytes

TAKES = "deltas"
MODELS = (1, None)


class Params(MethodParams):
    """Parameters of `sce`.

    Attributes:
        select_topk: share of the elements that differ between models which is selected, by largest variance; 1
            selects all elements, equal ones too.
    """

    select_topk: Annotated[float, Field(ge=0, le=1)] = 1.0


@dataclass(frozen=True)
class Selection:
    """Which elements of a tensor are selected.

    Attributes:
        cut: of the variances; `None` where all elements are.
        scale: power of 2 that the deltas are multiplied by, so that no square overflows or vanishes.
    """

    cut: Cut | None
    scale: float

    def drop(self, x: Floats, start: int) -> None:
        """Zero what is not selected in a slice `x` `[M, N]` that begins at flat index `start`."""
        if self.cut is None:
            return
        variance = _variance(x, self.scale)
        self.cut.drop(variance, start)
        selected = (variance != 0).astype(np.float32)
        for row in x:
            np.multiply(row, selected, out=row)


State = tuple[Selection, list[float]]


def prepare(tensor: TensorStream, params: Params) -> State:
    """Find the selected elements and each model's weight."""
    selection = _select(tensor, params.select_topk)
    squares = np.zeros(tensor.num_models)
    for start, x in tensor.stacked():
        selection.drop(x, start)
        for i, row in enumerate(x):
            wide = row.astype(np.float64)
            squares[i] += inner(wide, wide)
    total = squares.sum()
    return selection, (squares / total if total else np.ones(len(squares))).tolist()


def combine(x: Floats, params: Params, state: State, start: int) -> Floats:
    """Select, elect and merge one slice of deltas `[M, N]`."""
    selection, weights = state
    selection.drop(x, start)
    return agree_on_signs(x, weights, vote="total", divisor="weights")


def _select(tensor: TensorStream, share: float) -> Selection:
    if share == 1:
        return Selection(None, 1.0)
    differing, top = 0, 0.0
    for _, x in tensor.stacked():
        low, high = x.min(axis=0), x.max(axis=0)
        differing += int(np.count_nonzero(low != high))
        top = max(top, float(high.max()), -float(low.min()))
    scale = 2.0 ** -max(-126, min(126, frexp(top)[1]))

    def read(every: int = 1, begin: int = 0) -> Iterator[tuple[int, Floats]]:
        for start, x in tensor.stacked(every, begin):
            yield start, _variance(x, scale)[None]

    ((cut,),) = largest(read, tensor.count, [[int(differing * share)]])
    return Selection(cut, scale)


def _variance(x: Floats, scale: float) -> Floats:
    """Return a multiple of the variance over the models of `x` `[M, N]`: the squared differences of all pairs.

    No mean is rounded, so it is 0 exactly where all are equal, and equal where values on a grid make it so.
    """
    total, difference = np.zeros(x.shape[1], np.float32, like=x), np.empty(x.shape[1], np.float32, like=x)
    for a, b in combinations(x, 2):
        np.subtract(a, b, out=difference)
        np.multiply(difference, np.float32(scale), out=difference)
        np.multiply(difference, difference, out=difference)
        np.add(total, difference, out=total)
    return total


def memory(shape: tuple[int, ...], models: int) -> int:
    """Bound what finding the cut takes."""
    return search_bytes(prod(shape), 1)
