"""A linear model per expert.

`score_e(x) = a_e . x + b_e`.

On measured answers it is ridge regression of the quality, with the penalty that predicts each prompt best when it is
left out, which has a closed form (Allen, "The relationship between variable selection and data augmentation", 1974).
Where prompts were made for experts, it is logistic regression, on sparse vectors too.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from toolkit.errors import Problem, SpecError
from toolkit.routing.examples import Examples
from toolkit.routing.ops import State, Vectors, check_arrays, check_width, log_softmax, size
from toolkit.specs import Spec

SCORES = "quality"
SPARSE = True
PENALTIES = np.logspace(-6, 2, 33)
"""Ridge penalties that are tried, per row of the fit."""


class Params(Spec):
    """Parameters of `linear`.

    Attributes:
        penalty: of the squared weights, per row of the fit; by default chosen for ridge, and 1e-6 for logistic
            regression.
        steps: of L-BFGS, at most, for logistic regression.
    """

    penalty: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[int, Field(ge=1)] = 200


def fit(vectors: Any, examples: Examples, params: Params) -> dict[str, Vectors]:
    """Fit weights `[H, N]` and biases `[N]`.

    Raises:
        SpecError: measured answers with sparse vectors.
    """
    if examples.labelled:
        examples.members()
        weights, bias = _logistic(vectors, examples, params.penalty or 1e-6, params.steps)
    elif sparse.issparse(vectors):
        raise SpecError([Problem("words.dimensions", "linear on measured answers needs some dimensions, as 256")])
    else:
        weights, bias = _ridges(vectors.astype(np.float64), examples.quality, params.penalty)
    logistic = np.array([examples.labelled], np.float32)
    return {"weights": weights.astype(np.float32), "bias": bias.astype(np.float32), "logistic": logistic}


def score(vectors: Any, state: State) -> Vectors:
    """Return the predicted quality, or the logarithm of each expert's probability."""
    check_width(vectors, size(state, "weights", 0))
    scores = vectors @ state["weights"] + state["bias"]
    return log_softmax(scores) if state["logistic"][0] else scores


def check(state: State, num_experts: int) -> None:
    """Check that the arrays are all there, finite, and of sizes that fit each other and the experts."""
    check_arrays(state, {"weights": (-1, num_experts), "bias": (num_experts,), "logistic": (1,)})


def _ridges(x: NDArray[np.float64], quality: NDArray[np.float64], penalty: float | None) -> tuple[Any, Any]:
    """Fit the experts that were asked the same prompts together."""
    weights, bias = np.zeros((x.shape[1], quality.shape[1])), np.zeros(quality.shape[1])
    known = np.isfinite(quality)
    masks, which = np.unique(known, axis=1, return_inverse=True)
    for at in range(masks.shape[1]):
        columns, rows = np.flatnonzero(which == at), masks[:, at]
        if rows.any():
            weights[:, columns], bias[columns] = _ridge(x[rows], quality[rows][:, columns], penalty)
    return weights, bias


def _ridge(x: NDArray[np.float64], y: NDArray[np.float64], penalty: float | None) -> tuple[Any, Any]:
    """Return weights and biases; without a penalty, of the least squared error of rows left out."""
    count, mean_x, mean_y = len(x), x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean_x, y - mean_y
    squares, directions = np.linalg.eigh(x.T @ x)
    squares = np.maximum(squares, 0)
    turned = x @ directions
    projected = turned.T @ y

    def solved(value: float) -> NDArray[np.float64]:
        return projected / (squares + value * count)[:, None]

    def left_out(value: float) -> float:
        leverage = np.square(turned) @ (1 / (squares + value * count)) + 1 / count
        return float(np.square((y - turned @ solved(value)) / (1 - np.minimum(leverage, 1 - 1e-9))[:, None]).mean())

    best = min(PENALTIES, key=left_out) if penalty is None else penalty
    weights = directions @ solved(float(best))
    return weights, mean_y - mean_x @ weights


def _logistic(x: Any, examples: Examples, penalty: float, steps: int) -> tuple[Any, Any]:
    """Minimise the mean cross entropy and half the penalty times the squared weights."""
    from scipy.optimize import minimize

    count, width = x.shape
    num_experts = len(examples.experts)
    targets = np.eye(num_experts)[examples.labels]

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights, bias = flat[:-num_experts].reshape(width, num_experts), flat[-num_experts:]
        shares = log_softmax(x @ weights + bias)
        wrong = (np.exp(shares) - targets) / count
        value = -(targets * shares).sum() / count + penalty / 2 * np.square(weights).sum()
        return float(value), np.concatenate([(x.T @ wrong + penalty * weights).ravel(), wrong.sum(axis=0)])

    found = minimize(
        loss, np.zeros((width + 1) * num_experts), jac=True, method="L-BFGS-B", options={"maxiter": steps}
    ).x
    return found[:-num_experts].reshape(width, num_experts), found[-num_experts:]
