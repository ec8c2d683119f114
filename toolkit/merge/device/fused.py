"""Methods that are one kernel on a GPU: linear, task arithmetic, TIES and DARE, with the bits of their numpy form.

Step by step a device reads and writes every element a dozen times; in one kernel it does so once. Other methods, and
devices that are no GPU, take numpy's functions one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toolkit.kernels.merge_elementwise import KeptAtRandom, KeptLargest, Vote, merge_elementwise
from toolkit.kernels.merge_elementwise.api import BLOCK
from toolkit.merge.method import Method
from toolkit.merge.methods._dare import RandomMask
from toolkit.merge.random import Draws
from toolkit.merge.selection import Cut

Fused = Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor]
"""Merges a slice of all models `[M, N]`, float32, and adds the base `[N]`; told its first element."""


_SUMMED = ("linear", "task_arithmetic", "dare_linear")
_ELECTED = ("ties", "dare_ties")


def fuse(method: Method, params: Any, state: Any) -> Fused | None:
    """Return a method with its parameters, and what it knows of a tensor, as one kernel; `None` if it is none.

    Args:
        method: to run.
        params: for one tensor.
        state: what the method's `prepare` found.
    """
    if method.name in _SUMMED:
        # A sum that is not divided by its weights has them for factors.
        weights = method.coefficients(params, state) or params.weight
        return partial(_merge, weights=weights, marks=state or ())
    if method.name in _ELECTED:
        marks, zero = state
        vote = Vote(params.vote, zero, params.divisor if params.normalize else "none")
        return partial(_merge, weights=params.weight, marks=marks, vote=vote, scale=params.scale)
    return None


def _merge(
    x: torch.Tensor,
    base: torch.Tensor | None,
    start: int,
    *,
    weights: Sequence[float],
    marks: Sequence[Cut] | Sequence[RandomMask],
    vote: Vote | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    kept = _kept(marks, start, x) if marks else None
    return merge_elementwise(x, weights, kept=kept, vote=vote, scale=scale, base_N=base, start=start, impl="triton")


def _kept(marks: Sequence[Cut] | Sequence[RandomMask], start: int, x: torch.Tensor) -> KeptLargest | KeptAtRandom:
    """Return what is kept of a slice that begins at `start`."""
    cuts = [mark for mark in marks if isinstance(mark, Cut)]
    if cuts:
        return KeptLargest([cut.threshold for cut in cuts], [cut.last for cut in cuts])
    masks = [mark for mark in marks if isinstance(mark, RandomMask)]
    keys = torch.from_numpy(keys_of([mask.draws for mask in masks], start, start + x.shape[1])).to(x.device)
    return KeptAtRandom(keys, [round(mask.density * 2**32) for mask in masks], [mask.factor for mask in masks])


def keys_of(draws: Sequence[Draws], start: int, stop: int) -> NDArray[np.int32]:
    """Return the keys of the random numbers of the elements `start` to `stop`, as `KeptAtRandom` takes them."""
    blocks = range(start // BLOCK, -(-stop // BLOCK))
    keys = np.array([[own._keys(block) for block in blocks] for own in draws], np.uint32)
    return keys.reshape(len(draws), len(blocks), 2).view(np.int32)
