"""Nearest centroid: the expert whose prompts lie, on average, nearest to this one.

`score_e(x) = -(x - mu_e)^T Sigma^-1 (x - mu_e) / 2`, with the mean `mu_e` of an expert's prompts and the shrunk
covariance `Sigma` within experts.

Distance is Mahalanobis': features are whitened by their covariance within the experts, since in hidden states of
language models what a prompt is about varies far more than what is asked. The covariance is shrunk towards a multiple
of the identity, as far as Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
2004, find best for the number of prompts. A score is minus half the squared distance, so the difference of two scores
is the logarithm of the odds, were the experts' prompts normally distributed.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.routing.examples import Examples
from toolkit.routing.ops import State, Vectors, check_arrays, check_width, products, size
from toolkit.specs import Spec

SCORES = "log_probability"


class Params(Spec):
    """Parameters of `centroid`.

    Attributes:
        shrinkage: of the covariance, 0 to 1; 1 leaves plain distances. By default as Ledoit and Wolf estimate it.
    """

    shrinkage: Annotated[float, Field(ge=0, le=1)] | None = None


def fit(vectors: Vectors, examples: Examples, params: Params) -> dict[str, Vectors]:
    """Average and whiten the vectors of each expert."""
    x = vectors.astype(np.float64)
    means = np.stack([x[rows].mean(axis=0) for rows in examples.members()])
    center = means.mean(axis=0)
    whitening = _whitening(x - means[examples.labels], params.shrinkage)
    return {
        "center": center.astype(np.float32),
        "whitening": whitening.astype(np.float32),
        "centroids": ((means - center) @ whitening).astype(np.float32),
    }


def add(state: State, vectors: Vectors) -> dict[str, Vectors]:
    """Append an expert; the covariance stays that of the experts of the fit."""
    mean = (vectors.astype(np.float64).mean(axis=0) - state["center"]) @ state["whitening"]
    return dict(state) | {"centroids": np.vstack([state["centroids"], mean.astype(np.float32)])}


def score(vectors: Vectors, state: State) -> Vectors:
    """Return minus half the squared distance to every centroid."""
    check_width(vectors, state["center"].size)
    x, centroids = (vectors - state["center"]) @ state["whitening"], state["centroids"]
    return products(x, centroids) - (np.square(x).sum(axis=1, keepdims=True) + np.square(centroids).sum(axis=1)) / 2


def check(state: State, num_experts: int) -> None:
    """Check that the arrays are all there, finite, and of sizes that fit each other and the experts."""
    width = size(state, "center")
    check_arrays(state, {"center": (width,), "whitening": (width, width), "centroids": (num_experts, width)})


def _whitening(within: NDArray[np.float64], shrinkage: float | None) -> NDArray[np.float64]:
    """Return `[H, H]`, after which deviations from the experts' means have (nearly) unit covariance."""
    count, width = within.shape
    covariance = within.T @ within / count
    level = np.trace(covariance) / width
    if level <= 0:  # no expert has two different prompts
        return np.eye(width)
    identity = level * np.eye(width)
    if shrinkage is None:
        spread = (np.square(within).T @ np.square(within)).sum() / count - np.square(covariance).sum()
        shrinkage = float(np.clip(spread / count / np.square(covariance - identity).sum(), 1e-6, 1))
    values, directions = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * identity)
    return directions / np.sqrt(np.maximum(values, 1e-12 * level))
