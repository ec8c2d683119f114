"""Merge the weights or deltas of several models element by element: linear, task arithmetic, TIES and DARE.

The result is that of the same steps one by one in float32, to the last bit: every product and sum is rounded on its
own, and models are added in order.

Shape suffixes: M models, N elements, B blocks of random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from toolkit.kernels.impl import Impl, resolve

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 16
"""Elements that share their keys of random numbers."""


@dataclass(frozen=True)
class KeptLargest:
    """Elements of each model that are kept by their magnitude; the others are multiplied by 0.

    Attributes:
        thresholds: the bits of a float32 above which a magnitude is kept.
        lasts: of the elements at the threshold, those up to this index of the whole tensor are kept.
    """

    thresholds: Sequence[int]
    lasts: Sequence[int]


@dataclass(frozen=True)
class KeptAtRandom:
    """Elements of each model that are kept by a random number of 32 bits each, and made larger.

    An element's number is a hash, "lowbias32", of `place * stride + offset`, with its place in a block of `BLOCK`
    elements of the whole tensor and the block's two keys.

    Attributes:
        keys_MB2: int32, bits of the stride and offset of each block that the elements lie in.
        limits: numbers below are kept; `2**32` keeps all.
        factors: of what is kept.
    """

    keys_MB2: torch.Tensor
    limits: Sequence[int]
    factors: Sequence[float]


@dataclass(frozen=True)
class Vote:
    """How a sign is elected per element, with which what is added up must agree.

    Attributes:
        by: the sum of the weighted values, of the values, or of their signs.
        zero: sign where that is 0, 1 or -1.
        divisor: of the sum: the weights that agree, the number of models that agree and are not 0, or nothing.
    """

    by: Literal["weighted", "total", "frequency"] = "weighted"
    zero: float = 1.0
    divisor: Literal["weights", "count", "none"] = "weights"


def merge_elementwise(
    x_MN: torch.Tensor,
    weights: Sequence[float],
    *,
    kept: KeptLargest | KeptAtRandom | None = None,
    vote: Vote | None = None,
    scale: float = 1.0,
    base_N: torch.Tensor | None = None,
    start: int = 0,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Return `base + scale * sum_i weight_i * kept_i(x_i)`, of what agrees with the elected sign where there is a vote.

    Where all weights are one number and nothing is elected, what is multiplied is the sum.

    Args:
        x_MN: weights, or deltas, of any floating type; elements of a model lie next to each other.
        weights: of the models.
        kept: what is dropped first; `None` drops nothing.
        vote: see `Vote`; `None` adds up everything (Ilharco et al. 2022, arXiv:2212.04089), a vote makes it TIES (Yadav
            et al. 2023, arXiv:2306.01708), dropping at random DARE (Yu et al. 2023, arXiv:2311.03099).
        scale: of the sum.
        base_N: added in the end, of any floating type.
        start: index of the first element in the whole tensor.
        impl: form to run.

    Returns:
        `[N]` float32; float64 from the reference where `x` is.

    Raises:
        ValueError: numbers of models or elements that do not fit each other.
        UnsupportedError: no such form on this device.
    """
    form = resolve(impl, ("triton", "reference"), x_MN.device, "merge_elementwise")
    models, count = x_MN.shape
    given = [len(weights), *_numbers(kept)]
    if not models or given != [models] * len(given):
        raise ValueError(f"{', '.join(map(str, given))} numbers for {models} models")
    if base_N is not None and tuple(base_N.shape) != (count,):
        raise ValueError(f"a base {tuple(base_N.shape)} for {count} elements")
    if isinstance(kept, KeptAtRandom):
        blocks = -(-(start + count) // BLOCK) - start // BLOCK if count else 0
        if tuple(kept.keys_MB2.shape) != (models, blocks, 2):
            raise ValueError(f"keys {tuple(kept.keys_MB2.shape)} for {models} models and {blocks} blocks")
    if count > 1 and (x_MN.stride(1) != 1 or (base_N is not None and base_N.stride(0) != 1)):
        raise ValueError("elements must lie next to each other")
    if form == "triton":
        from toolkit.kernels.merge_elementwise.triton_form import merge_elementwise as run
    else:
        from toolkit.kernels.merge_elementwise.reference import merge_elementwise as run
    return run(x_MN, weights, kept, vote, scale, base_N, start)


def _numbers(kept: KeptLargest | KeptAtRandom | None) -> list[int]:
    if isinstance(kept, KeptLargest):
        return [len(kept.thresholds), len(kept.lasts)]
    return [] if kept is None else [len(kept.limits), len(kept.factors)]
