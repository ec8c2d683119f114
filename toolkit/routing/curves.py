"""What quality a router reaches for its cost: the measures of RouteLLM (Ong et al., 2024), exact where scores tie.

With two experts, requests go to the strong one in the order of a score. `share` is how many have gone, and the
performance gap recovered is `(quality - weak) / (strong - weak)`: 0 when all go to the weak one, 1 when all go to the
strong one, and above 1 where the weak one is right when the strong one is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Curve:
    """Mean quality by the share of requests that go to the strong expert; straight lines between the points.

    Requests of equal score go in no order, so that between their ends the curve is what it is on average.

    Attributes:
        share: `[K]`, rising from 0 to 1.
        quality: `[K]`.
    """

    share: NDArray[np.float64]
    quality: NDArray[np.float64]

    @property
    def recovered(self) -> NDArray[np.float64]:
        """The performance gap recovered, `[K]`; NaN where both experts are equally good on the whole."""
        weak, strong = self.quality[0], self.quality[-1]
        return (self.quality - weak) / (strong - weak) if strong != weak else np.full_like(self.quality, np.nan)

    def apgr(self) -> float:
        """Return the average of the gap recovered over all shares: 0.5 for a random choice."""
        return float(np.trapezoid(self.recovered, self.share))

    def cpt(self, level: float) -> float:
        """Return the smallest share of strong calls that recovers a part of the gap, such as 0.5."""
        recovered = self.recovered
        above = np.flatnonzero(recovered >= level)
        if not above.size:
            return float("nan")
        at = int(above[0])
        if at == 0:
            return 0.0
        part = (level - recovered[at - 1]) / (recovered[at] - recovered[at - 1])
        return float(self.share[at - 1] + part * (self.share[at] - self.share[at - 1]))

    def at(self, share: float) -> float:
        """Return the quality at a share."""
        return float(np.interp(share, self.share, self.quality))


def curve(scores: NDArray[np.floating], weak: NDArray[np.float64], strong: NDArray[np.float64]) -> Curve:
    """Return the curve of a score.

    Args:
        scores: `[B]`, the larger the sooner a request goes to the strong expert.
        weak: `[B]`, what the weak expert's answer to each is worth.
        strong: likewise.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.concatenate([[0], np.flatnonzero(np.diff(scores[order])) + 1, [len(order)]])
    gained = np.concatenate([[0.0], np.cumsum((strong - weak)[order])])
    return Curve(ends / len(order), weak.mean() + gained[ends] / len(order))


def calibration_error(predicted: NDArray[np.floating], actual: NDArray[np.float64], bins: int = 10) -> float:
    """Return the expected calibration error: how far predictions are from what came, on average over bins.

    Bins hold equally many predictions (Nixon et al., "Measuring calibration in deep learning", 2019).
    """
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, bins) if part.size]
    errors = [abs(predicted[part].mean() - actual[part].mean()) * part.size for part in parts]
    return float(np.sum(errors) / len(order))
