"""Nearest centroid: the expert whose prompts lie, on average, nearest to this one.

Distance is Mahalanobis': features are whitened by their covariance within the experts, since in hidden states of
language models what a prompt is about varies far more than what is asked. The covariance is shrunk towards a multiple
of the identity, as far as Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
2004, find best for the number of prompts. A score is minus half the squared distance, so the difference of two scores
is the logarithm of the odds, were the experts' prompts normally distributed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.errors import CheckpointError
from toolkit.routing.embedding import Vectors
from toolkit.specs import Spec


class Params(Spec):
    """Parameters of `centroid`.

    Attributes:
        shrinkage: of the covariance, 0 to 1; 1 leaves plain distances. By default as Ledoit and Wolf estimate it.
    """

    shrinkage: Annotated[float, Field(ge=0, le=1)] | None = None


def fit(vectors: Vectors, experts: NDArray[np.int64], num_experts: int, params: Params) -> dict[str, Vectors]:
    """Average and whiten the vectors of each expert."""
    x = vectors.astype(np.float64)
    means = np.stack([x[experts == i].mean(axis=0) for i in range(num_experts)])
    center = means.mean(axis=0)
    whitening = _whitening(x - means[experts], params.shrinkage)
    return {
        "center": center.astype(np.float32),
        "whitening": whitening.astype(np.float32),
        "centroids": ((means - center) @ whitening).astype(np.float32),
    }


def score(vectors: Vectors, state: Mapping[str, Vectors]) -> Vectors:
    """Return minus half the squared distance to every centroid.

    Raises:
        CheckpointError: vectors of another width than the router was fitted on.
    """
    if vectors.shape[1] != state["center"].size:
        given, wanted = vectors.shape[1], state["center"].size
        raise CheckpointError(f"the embedding has {given} numbers, the router was fitted on {wanted}; fit it anew")
    x, centroids = (vectors - state["center"]) @ state["whitening"], state["centroids"]
    return x @ centroids.T - (np.square(x).sum(axis=1, keepdims=True) + np.square(centroids).sum(axis=1)) / 2


def check(state: Mapping[str, Vectors], num_experts: int) -> None:
    """Check that the arrays are all there, finite, and of sizes that fit each other and the experts."""
    size = state["center"].size if "center" in state else 0
    wanted = {"center": (size,), "whitening": (size, size), "centroids": (num_experts, size)}
    for name, shape in wanted.items():
        if name not in state:
            raise CheckpointError(f"{name} is missing")
        if state[name].shape != shape:
            raise CheckpointError(f"{name} is {list(state[name].shape)}, expected {list(shape)}")
        if not np.isfinite(state[name]).all():
            raise CheckpointError(f"{name} holds values that are not finite")


def _whitening(within: NDArray[np.float64], shrinkage: float | None) -> NDArray[np.float64]:
    """Return `[H, H]`, after which deviations from the experts' means have (nearly) unit covariance."""
    count, size = within.shape
    covariance = within.T @ within / count
    level = np.trace(covariance) / size
    if level <= 0:  # no expert has two different prompts
        return np.eye(size)
    identity = level * np.eye(size)
    if shrinkage is None:
        spread = (np.square(within).T @ np.square(within)).sum() / count - np.square(covariance).sum()
        shrinkage = float(np.clip(spread / count / np.square(covariance - identity).sum(), 1e-6, 1))
    values, directions = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * identity)
    return directions / np.sqrt(np.maximum(values, 1e-12 * level))
