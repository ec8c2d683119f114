"""Cosine annealing with warm restarts (1608.03983), each begun by a warm-up of its own.

Within cycle `c`, at the share `u` of its way after the warm-up: `peak^c * (floor + (1 - floor) * (1 + cos(pi u)) / 2)`.

Re-warming is what goes on from a finished training needs: the loss rises at first, then falls below where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Annotated

from pydantic import Field

from toolkit.adapters.training._base import Course, TrainingMethod


class Restarts(TrainingMethod):
    """Cycles of warm-up and cosine."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            cycles: of equal length.
            warmup: share of each cycle in which the rate rises along a line.
            peak: that of a cycle over that of the one before.
            floor: rate at the end of a cycle, as a share of its peak.
        """

        cycles: Annotated[int, Field(ge=1)] = 3
        warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
        peak: Annotated[float, Field(gt=0, le=1)] = 1.0
        floor: Annotated[float, Field(ge=0, lt=1)] = 0.0

    params: Params

    def rate(self, course: Course) -> Callable[[int], float]:
        """Return the course of the rate."""
        p, length = self.params, course.steps / self.params.cycles

        def at(step: int) -> float:
            cycle = min(int(step / length), p.cycles - 1)
            done = step / length - cycle
            if done < p.warmup:
                return p.peak**cycle * done / p.warmup
            along = min((done - p.warmup) / (1 - p.warmup), 1.0)
            return p.peak**cycle * (p.floor + (1 - p.floor) * (1 + cos(pi * along)) / 2)

        return at
