"""Gaussian naive Bayes: each number of a vector is normally distributed within an expert, independently of the others.

`score_e(x) = log p_e - sum_h (log v_eh + (x_h - mu_eh)^2 / v_eh) / 2`, with the mean and the variance of each number
`h` over an expert's prompts.

It reaches its own best accuracy with O(log n) examples where logistic regression needs O(n), n being the width of the
vectors (Zheng et al., "Revisiting discriminative vs. generative classifiers: theory and implications", 2023), so it
is the router for a handful of prompts per expert. What is stored are sums: prompts can be added one by one, and an
expert's statistics never depend on another's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.routing.examples import Examples
from toolkit.routing.ops import State, Vectors, check_arrays, check_width, products, size
from toolkit.specs import Spec

SCORES = "log_probability"
FLOOR = 1e-6
"""Smallest variance; also beside the mean variance."""


class Params(Spec):
    """Parameters of `naive_bayes`.

    Attributes:
        variances: `own` to each expert, or `shared` by all, which makes the decision linear; shared ones change
            when an expert is added, and the other experts' scores with them.
        smoothing: how many prompts' worth the variances are drawn to their mean over the vector's numbers.
        prior: `uniform`, or by how many prompts each expert has (`counts`).
    """

    variances: Literal["own", "shared"] = "own"
    smoothing: Annotated[float, Field(ge=0)] = 10.0
    prior: Literal["uniform", "counts"] = "uniform"


def fit(vectors: Vectors, examples: Examples, params: Params) -> dict[str, Vectors]:
    """Count and average the vectors of each expert, and sum their squared deviations."""
    sums = [_sums(vectors[rows]) for rows in examples.members()]
    state = {name: np.concatenate([own[name] for own in sums]) for name in SUMS}
    settings = [params.variances == "shared", params.smoothing, params.prior == "counts"]
    return _derived(state | {"settings": np.array(settings, np.float32)})


def add(state: State, vectors: Vectors) -> dict[str, Vectors]:
    """Append an expert."""
    own = _sums(vectors)
    return _derived(dict(state) | {name: np.concatenate([state[name], own[name]]) for name in SUMS})


def observe(state: State, expert: int, vectors: Vectors) -> dict[str, Vectors]:
    """Take more prompts of an expert into account (Chan et al., "Updating formulae and a pairwise algorithm", 1979)."""
    old = {name: state[name][expert].astype(np.float64) for name in SUMS}
    new = {name: value[0].astype(np.float64) for name, value in _sums(vectors).items()}
    total, step = old["count"] + new["count"], new["mean"] - old["mean"]
    found = {
        "count": total,
        "mean": old["mean"] + step * new["count"] / total,
        "squares": old["squares"] + new["squares"] + np.square(step) * old["count"] * new["count"] / total,
    }
    changed = {name: state[name].copy() for name in SUMS}
    for name, value in found.items():
        changed[name][expert] = value
    return _derived(dict(state) | changed)


def remove(state: State, expert: int) -> dict[str, Vectors]:
    """Forget an expert."""
    return _derived(dict(state) | {name: np.delete(state[name], expert, axis=0) for name in SUMS})


def score(vectors: Vectors, state: State) -> Vectors:
    """Return the logarithm of each expert's density at the vectors, and of its prior where counts make one.

    What all experts have in common, the powers of 2 pi, is left out.
    """
    check_width(vectors, size(state, "precision"))
    x = vectors.astype(np.float32)
    return products(x, state["pull"]) - products(np.square(x), state["precision"]) / 2 + state["constant"]


def check(state: State, num_experts: int) -> None:
    """Check that the arrays are all there, finite, and of sizes that fit each other and the experts."""
    shape = (num_experts, size(state, "mean"))
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("mean", "squares", "precision", "pull"), shape)
    check_arrays(state, shapes | {"count": (num_experts,), "constant": (num_experts,), "settings": (3,)})


SUMS = ("count", "mean", "squares")
"""The arrays that all others follow from."""


def _sums(vectors: Vectors) -> dict[str, Vectors]:
    x = vectors.astype(np.float64)
    mean = x.mean(axis=0)
    own = {"count": np.array([len(x)]), "mean": mean[None], "squares": np.square(x - mean).sum(axis=0)[None]}
    return {name: value.astype(np.float32) for name, value in own.items()}


def _derived(state: dict[str, Vectors]) -> dict[str, Vectors]:
    """Add what the scores are computed from; a row of it depends on that row alone, unless variances are shared."""
    mean, precision = state["mean"].astype(np.float64), 1 / _variances(state)
    constant: Any = (np.log(precision) - np.square(mean) * precision).sum(axis=1) / 2
    if state["settings"][2]:
        constant = constant + np.log(state["count"])
    found = {"precision": precision, "pull": mean * precision, "constant": constant}
    return state | {name: value.astype(np.float32) for name, value in found.items()}


def _variances(state: State) -> NDArray[np.float64]:
    """Return `[N, H]`."""
    squares, count = state["squares"].astype(np.float64), state["count"].astype(np.float64)[:, None]
    if state["settings"][0]:
        squares = np.broadcast_to(squares.sum(axis=0), squares.shape)
        count = np.full_like(count, count.sum())
    level = np.maximum((squares / count).mean(axis=1, keepdims=True), FLOOR)
    smoothing = float(state["settings"][1])
    return np.maximum((squares + smoothing * level) / (count + smoothing), FLOOR * level)
