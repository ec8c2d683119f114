"""TIES: trim each delta to its largest elements, elect a sign per element, merge what agrees with it.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023 (arXiv:2306.01708). Tools of the field
differ in what they trim over, how they vote and what they divide by; each choice is a parameter here, and a preset
names those of the paper's code, of mergekit and of PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import agree_on_signs
from toolkit.merge.selection import Cut, largest, search_bytes

TAKES = "deltas"
MODELS = (1, None)


class Params(MethodParams):
    """Parameters of `ties`.

    Attributes:
        preset: whose choices hold where the spec makes none: `mergekit`, `paper` or `peft`.
        weight: of each model's delta.
        density: share of each delta that is kept, the largest by magnitude; at least one element.
        scale: `lambda` in a spec; of the merged delta.
        normalize: divide the sum of what agrees by `divisor`.
        trim: the largest elements of each `tensor`, or of the whole `model`.
        vote: for the sign of an element: `weighted` values, their `total` without weights, or `frequency` of signs.
        zero_vote: sign where the vote is 0: `plus`, or the `majority` of the tensor's elected signs.
        divisor: `weights` of the models that agree, or their `count`.
    """

    PRESETS = {
        "mergekit": {"trim": "tensor", "vote": "weighted", "zero_vote": "plus", "divisor": "weights"},
        "paper": {"trim": "model", "vote": "total", "zero_vote": "majority", "divisor": "count"},
        "peft": {"trim": "tensor", "vote": "total", "zero_vote": "plus", "divisor": "count"},
    }

    preset: Literal["mergekit", "paper", "peft"] = "mergekit"
    weight: tuple[float, ...] = (1.0,)
    density: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    scale: float = Field(1.0, alias="lambda")
    normalize: bool = True
    trim: Literal["tensor", "model"] = "tensor"
    vote: Literal["weighted", "total", "frequency"] = "weighted"
    zero_vote: Literal["plus", "majority"] = "plus"
    divisor: Literal["weights", "count"] = "weights"


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
    if params.zero_vote == "plus":
        return cuts, 1.0
    balance = 0
    for start, x in tensor.stacked():
        for row, cut in zip(x, cuts, strict=True):
            cut.drop(row, start)
        balance += int(np.sign(x.sum(axis=0)).sum())
    return cuts, 1.0 if balance >= 0 else -1.0


def combine(x: Floats, params: Params, state: State, start: int) -> Floats:
    """Trim, elect and merge one slice of deltas `[M, N]`."""
    cuts, zero = state
    for row, cut in zip(x, cuts, strict=True):
        cut.drop(row, start)
    divisor = params.divisor if params.normalize else "none"
    merged = agree_on_signs(x, params.weight, vote=params.vote, zero=zero, divisor=divisor)
    return np.multiply(merged, np.float32(params.scale), out=merged)


def memory(shape: tuple[int, ...], models: int) -> int:
    """Bound what finding the cuts takes."""
    return search_bytes(prod(shape), models)
