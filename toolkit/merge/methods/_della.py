"""What `della` and `della_linear` share: each element of a delta is dropped with a probability that its rank gives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from toolkit.checkpoints.deltas import CHUNK
from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.methods._remembered import Remembered
from toolkit.merge.ops import norm_ratios
from toolkit.merge.random import Draws
from toolkit.merge.selection import magnitude_bits

_NARROWEST = 1e-9
"""A window of probabilities narrower than this is as good as none."""


@dataclass(frozen=True)
class _Arrays:
    """Room to work on rows `[R, K]`."""

    place: NDArray[np.float64]
    index: NDArray[np.intp]
    bits: NDArray[np.uint32]
    ordered: NDArray[np.uint32]
    words: NDArray[np.uint32]


class _Scratch(threading.local):
    """Buffers of one thread, kept from slice to slice: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._wide, self._words = np.empty((2, 0), np.int64), np.empty((3, 0), np.uint32)

    def arrays(self, x: Floats) -> _Arrays:
        """Return room for rows like `x` `[R, K]`; what was there is lost."""
        if x.size > self._words.shape[1] or type(self._words) is not type(x):
            self._wide = np.empty((2, max(x.size, CHUNK)), np.int64, like=x)
            self._words = np.empty((3, max(x.size, CHUNK)), np.uint32, like=x)
        place, index = (part[: x.size].reshape(x.shape) for part in self._wide)
        bits, ordered, words = (part[: x.size].reshape(x.shape) for part in self._words)
        return _Arrays(place.view(np.float64), index.view(np.intp), bits, ordered, words)


_SCRATCH = _Scratch()


class DellaParams(MethodParams):
    """Parameters of dropping by rank.

    Attributes:
        preset: whose choices hold where the spec makes none: `mergekit` or `paper`.
        density: mean probability that an element of a model's delta is kept; 1 keeps the delta as it is.
        epsilon: the smallest element of a row is kept with probability `density - epsilon`, the largest with
            `density + epsilon`; half the width of the window.
        rescale: make what is kept larger.
        rescale_by: `norm`, so that the tensor's L1 norm stays what it was; or 1 / `probability`, that of each
            element itself, which keeps the mean.
        seed: of the random numbers, which also depend on the tensor's name and the model's position.
    """

    PRESETS = {"mergekit": {"rescale_by": "norm"}, "paper": {"rescale_by": "probability"}}

    preset: Literal["mergekit", "paper"] = "mergekit"
    density: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    epsilon: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.15,)
    rescale: bool = True
    rescale_by: Literal["norm", "probability"] = "norm"
    seed: int = 0

    @model_validator(mode="after")
    def _are_probabilities(self) -> DellaParams:
        for density, epsilon in zip(self.density, self.epsilon, strict=False):
            if density < 1 and not epsilon <= density <= 1 - epsilon:
                raise ValueError(f"density {density:g} plus or minus epsilon {epsilon:g} is not within 0 and 1")
        return self


@dataclass(frozen=True)
class RankedMask:
    """Which elements of one model's delta are kept, and what they are multiplied by.

    The probability of an element is linear in the rank of its magnitude within its row. Equal magnitudes share the
    mean of their ranks, and the one element of a row of one has the mean of all ranks.

    Attributes:
        draws: random numbers.
        density: mean of the probabilities.
        epsilon: from their mean to the smallest, and to the largest.
        factor: of what is kept; `None` for 1 / probability.
        remembered: masks of slices that were seen; `None` where each is seen once.
    """

    draws: Draws
    density: float
    epsilon: float
    factor: float | None = 1.0
    remembered: Remembered | None = None

    def drop(self, x: Floats, start: int) -> None:
        """Zero what is not kept in whole rows `x` `[R, K]` that begin at flat index `start`."""
        np.multiply(x, self._kept(x, start), out=x)

    def drop_and_rescale(self, x: Floats, start: int) -> None:
        """Zero what is not kept in whole rows `x` `[R, K]`, and multiply the rest."""
        if self.density == 1:
            return
        if self.factor is None:
            probability = self._probabilities(x)
            self.drop(x, start)
            np.divide(x, probability, out=x)
        else:
            self.drop(x, start)
            np.multiply(x, np.float32(self.factor), out=x)

    def _kept(self, x: Floats, start: int) -> NDArray[np.bool_]:
        """Return which elements of rows `[R, K]` are kept."""
        if self.remembered is None:
            return self._made(x, start)
        return self.remembered.mask(start, x.size, partial(self._made, x, start)).reshape(x.shape)

    def _made(self, x: Floats, start: int) -> NDArray[np.bool_]:
        if x.shape[1] == 1:
            return self.draws.below(self.density, start, start + x.size, like=x)[:, None]
        work = _SCRATCH.arrays(x)
        np.copyto(work.ordered, magnitude_bits(x, work.bits))
        work.ordered.sort(axis=1)
        self.draws.bits(start, start + x.size, work.words.reshape(-1))
        return work.bits >= self._wanted(work)

    def _wanted(self, work: _Arrays) -> NDArray[np.uint32]:
        """Return the magnitude from which each element is kept, given the sorted rows and the random words.

        An element is kept where its number u is below its probability, which is where its rank is above
        `(u - lowest) / (2 epsilon) * (K - 1)`; so the magnitude at that rank is looked up, and no rank computed.
        In steps of half a rank: step 2 r asks for the magnitude at rank r, step 2 r + 1 for more than it, which is
        the same as step 2 r + 2 unless the two are equal. Step 0 keeps all elements, step 2 K - 1 none.
        """
        rows, width = work.words.shape
        epsilon = max(self.epsilon, _NARROWEST)
        steps = (width - 1) / epsilon
        low, high = (self.density - epsilon) * steps - 1, (self.density + epsilon) * steps
        place = np.multiply(work.words, steps * 2.0**-32, out=work.place, dtype=np.float64)
        np.clip(place, low + 0.5, high + 0.5, out=place)
        first = np.arange(rows)[:, None] * (2.0 * width)
        index = np.add(place, first - low, out=work.index, dtype=np.float64, casting="unsafe")
        more = np.bitwise_and(index, 1, out=work.place.view(np.intp))
        np.right_shift(index, 1, out=index)
        wanted = np.take(work.ordered, index, out=work.words, mode="clip")
        return np.add(wanted, more, out=wanted, casting="unsafe")

    def _probabilities(self, x: Floats) -> NDArray[np.float32]:
        rows, width = x.shape
        if width == 1:
            return np.full(x.shape, self.density, np.float32, like=x)
        # Behind the number of their row, sorted rows are one sorted vector.
        keys = (np.arange(rows, dtype=np.uint64)[:, None] << np.uint64(32)) + magnitude_bits(x)
        whole = np.sort(keys, axis=1).reshape(-1)
        first, last = np.searchsorted(whole, keys, "left"), np.searchsorted(whole, keys, "right") - 1
        rank = (first + last) / 2 - np.arange(rows)[:, None] * width
        probability = self.density + self.epsilon * (2 * rank / (width - 1) - 1)
        # Where it is 0 nothing is kept, but 0 is still divided by it.
        return np.maximum(probability, _NARROWEST).astype(np.float32)


def masks(tensor: TensorStream, params: DellaParams) -> list[RankedMask]:
    """Return the mask of each model; keeping a norm takes a pass over the tensor."""
    found = [
        RankedMask(Draws(params.seed, tensor.name, i), density, epsilon)
        for i, (density, epsilon) in enumerate(zip(params.density, params.epsilon, strict=True))
    ]
    if not params.rescale:
        return found
    if params.rescale_by == "probability":
        return [mask if mask.density == 1 else replace(mask, factor=None) for mask in found]
    elements, width = tensor.count * tensor.num_models, tensor.shape[-1] if tensor.shape else 1
    found = [replace(mask, remembered=Remembered(elements)) for mask in found]
    factors = norm_ratios(tensor, [None if m.density == 1 else partial(_drop, m, width) for m in found])
    return [replace(mask, factor=factor) for mask, factor in zip(found, factors, strict=True)]


def _drop(mask: RankedMask, width: int, x: Floats, start: int) -> None:
    mask.drop(x.reshape(-1, width), start)


def drop_all(masks: Sequence[RankedMask], x: Floats, start: int) -> Floats:
    """Drop and rescale whole rows `[M, R, K]` in place; returns them as `[M, R * K]`."""
    for rows, mask in zip(x, masks, strict=True):
        mask.drop_and_rescale(rows, start)
    return x.reshape(len(x), -1)
