"""The power schedule: a learning rate that knows neither the batch size nor the number of tokens to come (2408.13359).

`rate(n) = min(1, beta a n^b) * learning_rate` for `n` tokens that were trained before a step and `beta` rows of a step,
after a linear warm-up; with `decay`, it falls to zero in a last share of the steps. Without, it does not depend on how
long the run is, so that a longer run goes on where a shorter one ends. `a` and `b` are to be fitted on short runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from toolkit.adapters.training._base import Course, TrainingMethod


class Power(TrainingMethod):
    """A power of the tokens seen."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            a: amplitude; the rate is at its cap until `beta a n^b` falls below 1.
            b: exponent.
            warmup_steps: in which the rate rises from 0.
            decay: share of the steps at the end in which it falls to 0 along a line.
        """

        a: Annotated[float, Field(gt=0)] = 4.0
        b: Annotated[float, Field(lt=0)] = -0.51
        warmup_steps: Annotated[int, Field(ge=0)] = 0
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.0

    params: Params

    def rate(self, course: Course) -> Callable[[int], float]:
        """Return the course of the rate."""
        p = self.params

        def at(step: int) -> float:
            tokens = max(step, 1) * course.tokens
            share = min(1.0, course.rows * p.a * tokens**p.b)
            if step < p.warmup_steps:
                share *= step / p.warmup_steps
            falling = p.decay * course.steps
            left = course.steps - step
            return share * (max(left, 0) / falling if falling and left < falling else 1.0)

        return at
