"""The numbers that are learned, and the set that they are held in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from toolkit.merge.learning.blocks import Values
from toolkit.merge.learning.spec import CoefficientParams


class Coefficients:
    """One coefficient per model and group: `scale * weights`, both of which can be trained.

    Args:
        models: how many.
        groups: of tensors, how many.
        params: start value and bounds.
        scale: of all coefficients; `None` for 1, which is not trained.

    Attributes:
        weights: `[M, G]` float64.
        scale: a float64 number, or `None`.
    """

    def __init__(self, models: int, groups: int, params: CoefficientParams, scale: float | None = None) -> None:
        self.params = params
        self.weights = torch.full((models, groups), params.start_of(models), dtype=torch.float64, requires_grad=True)
        self.scale = None if scale is None else torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        self.project()

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [self.weights] if self.scale is None else [self.weights, self.scale]

    def values(self) -> Values:
        """Return the coefficients `[M, G]`."""
        return self._product().detach().numpy().copy()

    def backward(self, gradient: Values) -> None:
        """Pass the gradient of a loss by the coefficients `[M, G]` on to what is trained."""
        self._product().backward(torch.from_numpy(gradient))

    def _product(self) -> Tensor:
        return self.weights * (1.0 if self.scale is None else self.scale)

    def project(self) -> None:
        """Put the weights at the nearest point of their set."""
        with torch.no_grad():
            if self.params.bounds == "clamp":
                self.weights.clamp_(self.params.low, self.params.high)
            elif self.params.bounds == "simplex":
                self.weights.copy_(torch.from_numpy(onto_simplex(self.weights.numpy())))


def onto_simplex(points: Values) -> Values:
    """Return the nearest points whose entries are at least 0 and sum to 1, column by column of `[M, G]`.

    Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", 2008: what is left of the
    sorted entries above 0 is lowered by one common amount.
    """
    ordered = -np.sort(-points, axis=0)
    ranks = np.arange(1, len(points) + 1)[:, None]
    excess = (np.cumsum(ordered, axis=0) - 1) / ranks
    kept = (ordered > excess).sum(axis=0)
    return np.maximum(points - excess[kept - 1, np.arange(points.shape[1])], 0)
