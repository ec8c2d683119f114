"""Clusters of prompts, and the best expert of each: what the experts were worth on the prompts of the same cluster.

`score_e(x) = (sum_{j in c(x)} quality_e(j) + k mean_e) / (|c(x)| + k)`, with the prompts of the nearest cluster
`c(x)`, the mean `mean_e` over all prompts and the `smoothing` `k`; averaged over the `nearest` clusters.

The form of Zhang et al., "The Avengers: a simple recipe for uniting smaller language models", 2025: k-means, then the
mean quality by cluster, here drawn towards the mean over all prompts by a few prompts' worth.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.routing.examples import Examples
from toolkit.routing.ops import State, Vectors, check_arrays, check_width, size
from toolkit.specs import Spec

SCORES = "quality"
STEPS = 30
"""Of Lloyd's algorithm, at most."""


class Params(Spec):
    """Parameters of `cluster`.

    Attributes:
        clusters: how many.
        nearest: clusters of a prompt that are averaged, the nearest ones.
        smoothing: prompts' worth of the mean over all.
        seed: of the first centres.
    """

    clusters: Annotated[int, Field(ge=1)] = 64
    nearest: Annotated[int, Field(ge=1)] = 3
    smoothing: Annotated[float, Field(ge=0)] = 5.0
    seed: Annotated[int, Field(ge=0)] = 0


def fit(vectors: Vectors, examples: Examples, params: Params) -> dict[str, Vectors]:
    """Find the clusters; average the quality in each."""
    count = min(params.clusters, len(examples))
    rng = np.random.default_rng(params.seed)
    centers, which = _clusters(vectors.astype(np.float64), count, rng)
    known = np.isfinite(examples.quality)
    quality = np.where(known, examples.quality, 0)
    overall = quality.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    total, counts = np.zeros((count, quality.shape[1])), np.zeros((count, quality.shape[1]))
    np.add.at(total, which, quality)
    np.add.at(counts, which, known)
    # An empty cluster without smoothing says nothing of its own.
    mean = (total + params.smoothing * overall) / np.maximum(counts + params.smoothing, 1e-9)
    mean = np.where(counts + params.smoothing > 0, mean, overall)
    nearest = np.array([min(params.nearest, count)], np.float32)
    return {"centers": centers.astype(np.float32), "quality": mean.astype(np.float32), "nearest": nearest}


def score(vectors: Vectors, state: State) -> Vectors:
    """Return the mean quality in the nearest clusters."""
    centers = state["centers"]
    check_width(vectors, size(state, "centers"))
    distance = np.square(centers).sum(axis=1) - 2 * vectors @ centers.T
    nearest = np.argsort(distance, axis=1, kind="stable")[:, : int(state["nearest"][0])]
    return state["quality"][nearest].mean(axis=1)


def check(state: State, num_experts: int) -> None:
    """Check that the arrays are all there, finite, and of sizes that fit each other and the experts."""
    count = size(state, "centers", 0)
    check_arrays(state, {"centers": (count, -1), "quality": (count, num_experts), "nearest": (1,)})


def _clusters(x: NDArray[np.float64], count: int, rng: np.random.Generator) -> tuple[NDArray, NDArray[np.int64]]:
    """Return `[K, H]` centres and `[B]` which is nearest, by Lloyd's algorithm; an empty cluster keeps its centre."""
    centers = x[np.sort(rng.permutation(len(x))[:count])]
    which = np.zeros(len(x), np.int64)
    for _ in range(STEPS):
        which = (np.square(centers).sum(axis=1) - 2 * x @ centers.T).argmin(axis=1)
        sizes = np.bincount(which, minlength=count)
        totals = np.zeros_like(centers)
        np.add.at(totals, which, x)
        moved = np.where(sizes[:, None] > 0, totals / np.maximum(sizes, 1)[:, None], centers)
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers, which
