"""Whether prompts are still like those of the fit, told by the distribution of the router's scores.

What is kept of the fit are two histograms, of the best score and of how far it is ahead of the second, over ten bins
of equal share. The scores of each prompt come from a router that was fitted on others (cross-validation): scores of a
router's own prompts are better than any that will come. The measure is the population stability index,
`sum (now - then) ln(now / then)` over the bins; by the custom of credit scoring, where it comes from, below 0.1
nothing has changed and above 0.25 much has.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.routing.ops import State, check_arrays

MEASURES = ("score", "margin")
BINS = 10
FEWEST = 100
"""Prompts, then and now, below which an index would be noise."""

ENOUGH = 1000
"""Prompts of the fit whose scores are enough for a histogram."""

WINDOW = 1000
"""Decisions that a meter looks back on."""


def measures(scores: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the best of the scores `[B, N]` and its margin, `[2, B]`; a single expert's margin is 0."""
    ranked = np.sort(scores.astype(np.float32), axis=1)[:, ::-1]
    margin = ranked[:, 0] - ranked[:, 1] if ranked.shape[1] > 1 else np.zeros(len(ranked), np.float32)
    return np.stack([ranked[:, 0], margin])


def fit(scores: NDArray[np.floating]) -> dict[str, NDArray[np.float32]]:
    """Return the histograms of scores `[B, N]`: `edges [2, 9]` and `shares [2, 10]`; nothing of too few prompts."""
    if len(scores) < FEWEST:
        return {}
    found = measures(scores)
    inner = np.linspace(0, 1, BINS + 1)[1:-1]
    edges = np.quantile(found, inner, axis=1).T.astype(np.float32)
    shares = _counts(found, edges) / found.shape[1]
    return {"edges": edges, "shares": shares.astype(np.float32)}


def check(state: State) -> None:
    """Raise a `CheckpointError` where a state is not one that `fit` returns."""
    if state:
        check_arrays(state, {"edges": (len(MEASURES), BINS - 1), "shares": (len(MEASURES), BINS)})


def index(scores: NDArray[np.floating], state: State) -> dict[str, float]:
    """Return the population stability index of scores `[B, N]` by measure; nothing where it would be noise."""
    if not state or len(scores) < FEWEST:
        return {}
    found = measures(scores)
    return _index(_counts(found, state["edges"]), state["shares"])


class Meter:
    """The index of the last decisions of a server.

    Args:
        state: of the fit; may be empty.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._bins: deque[tuple[int, ...]] = deque(maxlen=WINDOW)

    def observe(self, scores: NDArray[np.floating]) -> None:
        """Take decisions by scores `[B, N]` into account."""
        if self.state:
            self._bins.extend(map(tuple, _places(measures(scores), self.state["edges"]).T.tolist()))

    def index(self) -> dict[str, float]:
        """Return the index by measure; nothing after too few decisions, or without histograms of the fit."""
        places = np.array(list(self._bins.copy()), np.int64)
        if len(places) < FEWEST:
            return {}
        counts = np.stack([np.bincount(column, minlength=BINS) for column in places.T])
        return _index(counts, self.state["shares"])


def _places(found: NDArray[np.float32], edges: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the bin of each value, `[2, B]`."""
    return np.stack([np.searchsorted(e, row, side="right") for e, row in zip(edges, found, strict=True)])


def _counts(found: NDArray[np.float32], edges: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.stack([np.bincount(places, minlength=BINS) for places in _places(found, edges)])


def _index(counts: NDArray[Any], then: NDArray[np.float32]) -> dict[str, float]:
    """Return the index of counts `[2, 10]` against shares `[2, 10]`; an empty bin counts as half a prompt."""
    total = counts.sum(axis=1, keepdims=True)
    now = np.maximum(counts, 0.5) / total
    then = np.maximum(then.astype(np.float64), 0.5 / total)
    found = ((now - then) * np.log(now / then)).sum(axis=1)
    return dict(zip(MEASURES, map(float, found), strict=True))
