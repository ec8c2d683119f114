"""What `dare_linear` and `dare_ties` share: elements of a delta are dropped at random, the rest made larger for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.methods._remembered import Remembered
from toolkit.merge.ops import norm_ratios
from toolkit.merge.random import Draws


class DareParams(MethodParams):
    """Parameters of dropping at random.

    Attributes:
        preset: whose choices hold where the spec makes none: `mergekit`, `paper` or `peft`.
        density: probability that an element of a model's delta is kept.
        rescale: make what is kept larger.
        rescale_by: `norm`, so that the tensor's L1 norm stays what it was; or 1 / `density`, which keeps the mean.
        seed: of the random numbers, which also depend on the tensor's name and the model's position.
    """

    preset: Literal["mergekit", "paper", "peft"] = "mergekit"
    density: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    rescale: bool = True
    rescale_by: Literal["norm", "density"] = "norm"
    seed: int = 0


@dataclass(frozen=True)
class RandomMask:
    """Which elements of one model's delta are kept, and what they are multiplied by.

    Attributes:
        draws: random numbers.
        density: probability that an element is kept.
        factor: of what is kept.
        remembered: masks of slices that were seen; `None` where each is seen once.
    """

    draws: Draws
    density: float
    factor: float = 1.0
    remembered: Remembered | None = None

    def drop(self, x: Floats, start: int) -> None:
        """Zero what is not kept in a slice `x` `[N]` that begins at flat index `start`."""
        if self.density == 1:
            return
        make = partial(self.draws.below, self.density, start, start + len(x), like=x)
        np.multiply(x, self.remembered.mask(start, len(x), make) if self.remembered else make(), out=x)

    def drop_and_rescale(self, x: Floats, start: int) -> None:
        """Zero what is not kept in a slice `x` `[N]`, and multiply the rest."""
        self.drop(x, start)
        if self.factor != 1:
            np.multiply(x, np.float32(self.factor), out=x)


def masks(tensor: TensorStream, params: DareParams) -> list[RandomMask]:
    """Return the mask of each model; keeping a norm takes a pass over the tensor."""
    found = [RandomMask(Draws(params.seed, tensor.name, i), density) for i, density in enumerate(params.density)]
    if not params.rescale:
        return found
    if params.rescale_by == "density":
        return [replace(mask, factor=1 / mask.density) for mask in found]
    elements = tensor.count * tensor.num_models
    found = [replace(mask, remembered=Remembered(elements)) for mask in found]
    factors = norm_ratios(tensor, [None if mask.density == 1 else mask.drop for mask in found])
    return [replace(mask, factor=factor) for mask, factor in zip(found, factors, strict=True)]


def drop_all(masks: Sequence[RandomMask], x: Floats, start: int) -> Floats:
    """Drop and rescale one slice of deltas `[M, N]`, in place."""
    for row, mask in zip(x, masks, strict=True):
        mask.drop_and_rescale(row, start)
    return x
