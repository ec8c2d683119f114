"""TIES: trim each delta to its largest elements, elect a sign per element, merge what agrees with it.

Of the deltas `d_i`, each trimmed to its `density` of largest elements, the result is
`theta_0 + lambda * sum_i w_i d_i [sign d_i = s] / sum_i w_i [sign d_i = s]` with `s = sign(sum_i w_i d_i)`.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023 (arXiv:2306.01708). Tools of the field
differ in what they trim over, how they vote and what they divide by; each choice is a parameter here, and a preset
names those of the paper's code, of mergekit and of PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream
from toolkit.merge.methods._sign_consensus import ConsensusParams, merge_by_consensus, sign_of_ties
from toolkit.merge.selection import Cut, largest, search_bytes

TAKES = "deltas"
MODELS = (1, None)


class Params(ConsensusParams):
    """Parameters of `ties`: those of a sign consensus, and what is trimmed before.

    Attributes:
        preset: whose choices hold where the spec makes none: `mergekit`, `paper` or `peft`.
        density: share of each delta that is kept, the largest by magnitude; at least one element.
        trim: the largest elements of each `tensor`, or of the whole `model`.
    """

    PRESETS = {
        "mergekit": {"trim": "tensor", "vote": "weighted", "zero_vote": "plus", "divisor": "weights"},
        "paper": {"trim": "model", "vote": "total", "zero_vote": "majority", "divisor": "count"},
        "peft": {"trim": "tensor", "vote": "total", "zero_vote": "plus", "divisor": "count"},
    }

    preset: Literal["mergekit", "paper", "peft"] = "mergekit"
    density: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    normalize: bool = True
    trim: Literal["tensor", "model"] = "tensor"


State = tuple[Sequence[Cut], float]


def survey(tensors: Sequence[tuple[TensorStream, Params]]) -> list[list[Cut] | None]:
    """Find one cut per model over all tensors whose trimming is of the whole model; their densities add up."""
    chosen = [(tensor, params) for tensor, params in tensors if params.trim == "model"]
    offsets = [0, *np.cumsum([tensor.count for tensor, _ in chosen]).tolist()]

    def read(every: int = 1, begin: int = 0) -> Iterator[tuple[int, Floats]]:
        for offset, (tensor, _) in zip(offsets, chosen, strict=False):
            if begin < offset + tensor.count:
                for start, x in tensor.stacked(every, max(0, begin - offset)):
                    yield offset + start, x

    models = range(chosen[0][0].num_models if chosen else 0)
    keep = [int(sum(params.density[model] * tensor.count for tensor, params in chosen)) for model in models]
    cuts = [cut for (cut,) in largest(read, offsets[-1], [[max(1, k)] for k in keep])]
    own = {
        tensor.name: [Cut(cut.threshold, cut.last - offset) for cut in cuts]
        for offset, (tensor, _) in zip(offsets, chosen, strict=False)
    }
    return [own.get(tensor.name) for tensor, _ in tensors]


def prepare(tensor: TensorStream, params: Params) -> State:
    """Find what each model keeps, and the sign of elements without a vote."""
    cuts = tensor.surveyed
    if not cuts:
        keep = [[max(1, int(density * tensor.count))] for density in params.density]
        cuts = [cut for (cut,) in largest(tensor.stacked, tensor.count, keep)]
    return cuts, sign_of_ties(tensor, params, partial(_trim, cuts))


def combine(x: Floats, params: Params, state: State, start: int) -> Floats:
    """Trim, elect and merge one slice of deltas `[M, N]`."""
    cuts, zero = state
    return merge_by_consensus(_trim(cuts, x, start), params, zero)


def _trim(cuts: Sequence[Cut], x: Floats, start: int) -> Floats:
    for row, cut in zip(x, cuts, strict=True):
        cut.drop(row, start)
    return x


def memory(shape: tuple[int, ...], models: int) -> int:
    """Bound what finding the cuts takes."""
    return search_bytes(prod(shape), models)
