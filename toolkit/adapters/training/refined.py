"""A schedule refined by the gradient norms of an earlier run (2310.07831).

With weights `w_t = norm_t^-power`, the norms smoothed by a running median, `rate_t` is `w_t sum_{s > t} w_s`, scaled to
a largest value of 1. For equal norms that is the line to zero, which is best in the worst case; for norms that fall
it warms up first and anneals late. The last step has the rate 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from toolkit.adapters.training._base import Course, TrainingMethod
from toolkit.errors import Problem


class Refined(TrainingMethod):
    """The worst-case optimal schedule for the norms that were seen."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            metrics: `metrics.jsonl` of an earlier run of the same kind, whose `grad_norm` entries are read; a run of
                another length is stretched to this one's.
            power: 2 for SGD; 1 for Adam, whose own norm is the sum of magnitudes, which is not logged: the Euclidean
                one stands for it here.
            smoothing: share of the steps that the median goes over.
        """

        metrics: str
        power: Annotated[float, Field(gt=0)] = 1.0
        smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1

    params: Params

    def faults(self) -> Iterator[Problem]:
        """Refuse a file without norms."""
        try:
            found = len(self._norms())
        except (OSError, ValueError, KeyError):
            found = 0
        if found < 2:
            message = f"{self.params.metrics}: no metrics of a run with at least two entries of grad_norm above 0"
            yield Problem(f"{self.where}.metrics", message)

    def rate(self, course: Course) -> Callable[[int], float]:
        """Return the course of the rate."""
        rates = refined(self._norms(), course.steps, self.params.power, self.params.smoothing)
        return lambda step: float(rates[min(step, len(rates) - 1)])

    def _norms(self) -> np.ndarray:
        lines = Path(os.path.expanduser(self.params.metrics)).read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        return np.array([e["grad_norm"] for e in entries if e.get("grad_norm", 0) > 0])


def refined(norms: np.ndarray, steps: int, power: float, smoothing: float) -> np.ndarray:
    """Return the rate of every step, at most 1.

    Args:
        norms: of gradients, at equal distances over a run.
        steps: of the run that the rates are for.
        power: of the norms in the weights.
        smoothing: share of the norms that the running median goes over.
    """
    half = int(len(norms) * smoothing / 2)
    smooth = np.array([np.median(norms[max(i - half, 0) : i + half + 1]) for i in range(len(norms))])
    at = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(smooth)), smooth)
    weights = at**-power
    rates = weights * np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    return rates / rates.max() if rates.max() > 0 else rates
