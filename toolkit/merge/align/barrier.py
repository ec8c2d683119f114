"""The loss barrier along the straight line between two models.

`barrier(alpha) = L((1 - alpha) theta_0 + alpha theta_1) - ((1 - alpha) L(theta_0) + alpha L(theta_1))`

Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (2020, arXiv:1912.05671). It is 0 at both
ends by definition; two models whose barrier is near 0 throughout can be averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Line:
    """Losses along the line between two models.

    Attributes:
        alphas: points, the first 0 and the last 1.
        losses: at each.
    """

    alphas: Sequence[float]
    losses: Sequence[float]

    @property
    def barriers(self) -> list[float]:
        """Return the loss above the straight line between the ends, at each point."""
        first, last = self.losses[0], self.losses[-1]
        return [
            0.0 if alpha in (0, 1) else loss - ((1 - alpha) * first + alpha * last)
            for alpha, loss in zip(self.alphas, self.losses, strict=True)
        ]

    @property
    def highest(self) -> float:
        """Largest barrier; it is at least 0, as at the ends."""
        return max(self.barriers)


def walk(
    start: nn.Module,
    end: nn.Module,
    alphas: Sequence[float],
    measure: Callable[[nn.Module], float],
    *,
    among: Callable[[str], bool] = lambda name: True,
) -> Line:
    """Measure the models along the line between two.

    Args:
        start: the model at 0; it is changed, and given back as it was.
        end: the model at 1, of the same class and sizes.
        alphas: points to measure, the first 0 and the last 1.
        measure: returns the loss of a model.
        among: names of the parameters that go along the line; the others stay as they are in `start`.

    Raises:
        UnsupportedError: parameters of other names or shapes.
    """
    import torch

    moving = {name: value for name, value in start.named_parameters() if among(name)}
    targets = dict(end.named_parameters())
    for name, value in moving.items():
        if name not in targets or targets[name].shape != value.shape:
            raise UnsupportedError(f"no line between the two models: {name} differs in more than its values")
    saved = {name: value.detach().clone() for name, value in moving.items()}
    try:
        losses = []
        for alpha in alphas:
            with torch.no_grad():
                for name, value in moving.items():
                    value.copy_(_between(saved[name], targets[name], alpha))
            losses.append(measure(start))
    finally:
        with torch.no_grad():
            for name, value in moving.items():
                value.copy_(saved[name])
    return Line(alphas, losses)


def _between(start: torch.Tensor, end: torch.Tensor, alpha: float) -> torch.Tensor:
    import torch

    return torch.lerp(start.float(), end.to(start.device).float(), alpha)
