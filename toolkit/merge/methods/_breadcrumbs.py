"""What `breadcrumbs` and `breadcrumbs_ties` share: the largest and the smallest elements of a delta are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import norm_ratios
from toolkit.merge.selection import NONE, Cut, largest


class BreadcrumbsParams(MethodParams):
    """Parameters of dropping both ends.

    Attributes:
        density: share of each delta that is kept; at least one element.
        gamma: share that is dropped as the largest by magnitude, or less where `density` leaves less; the rest of
            what is dropped are the smallest.
        rescale: multiply what is kept so that the tensor's L1 norm stays what it was.
    """

    density: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    gamma: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.01,)
    rescale: bool = False


@dataclass(frozen=True)
class Band:
    """Which elements of one model's delta are kept: those of `inside` that are not of `top`.

    Attributes:
        top: the largest.
        inside: the largest and what is kept.
        factor: of what is kept.
    """

    top: Cut
    inside: Cut
    factor: float = 1.0

    def drop(self, x: Floats, start: int) -> None:
        """Zero what is not kept in a slice `x` `[N]` that begins at flat index `start`."""
        self.inside.drop(x, start)
        if self.top == NONE:
            return
        largest_ones = x.copy()
        self.top.drop(largest_ones, start)
        np.subtract(x, largest_ones, out=x)

    def drop_and_rescale(self, x: Floats, start: int) -> None:
        """Zero what is not kept in a slice `x` `[N]`, and multiply the rest."""
        self.drop(x, start)
        if self.factor != 1:
            np.multiply(x, np.float32(self.factor), out=x)


def bands(tensor: TensorStream, params: BreadcrumbsParams) -> list[Band]:
    """Find what each model keeps: two exact cuts."""
    count = tensor.count
    kept = [max(1, int(density * count)) for density in params.density]
    dropped = [min(int(gamma * count), count - k) for gamma, k in zip(params.gamma, kept, strict=True)]
    cuts = largest(tensor.stacked, count, [[d, d + k] for d, k in zip(dropped, kept, strict=True)])
    found = [Band(top, inside) for top, inside in cuts]
    if not params.rescale:
        return found
    factors = norm_ratios(tensor, [None if k == count else b.drop for b, k in zip(found, kept, strict=True)])
    return [replace(band, factor=factor) for band, factor in zip(found, factors, strict=True)]


def drop_all(bands: Sequence[Band], x: Floats, start: int) -> Floats:
    """Drop both ends of one slice of deltas `[M, N]`, and rescale it, in place."""
    for row, band in zip(x, bands, strict=True):
        band.drop_and_rescale(row, start)
    return x
