"""Methods against mergekit's on trained weights; those that draw at random have this test in files of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mergekit.merge_methods import merge_tensors

from tests.merge.laws import WEIGHTS, run
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.merge.method import load_method

DENSITY = (0.3, 0.5, 0.9)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "linear": (3, {"weight": WEIGHTS}),
    "slerp": (1, {"t": 0.3}),
    "nuslerp": (2, {"weight": (0.4, 0.6)}),
    "multislerp": (3, {"weight": WEIGHTS}),
    "karcher": (3, {"max_iter": 200, "tol": 1e-10}),
    "task_arithmetic": (3, {"weight": WEIGHTS, "lambda": 0.7}),
    "ties": (3, {"weight": WEIGHTS, "density": DENSITY, "lambda": 0.7}),
    "breadcrumbs": (3, {"weight": WEIGHTS, "density": DENSITY, "gamma": (0.01, 0.05, 0.1)}),
    "breadcrumbs_ties": (3, {"weight": WEIGHTS, "density": DENSITY, "gamma": (0.01, 0.05, 0.1)}),
    "model_stock": (3, {}),
    "sce": (3, {"select_topk": 0.3}),
    "arcee_fusion": (1, {}),
    "nearswap": (1, {"t": 0.001}),
    "ram": (3, {}),
    "ramplus_tl": (3, {}),
}
"""Methods -> how many models are merged besides the base, and parameters."""


@pytest.fixture(scope="module")
def projections() -> np.ndarray:
    """One projection of the MLP of every layer of a trained model, `[L, N, K]`: the base and fine-tunes near it.

    No two changes are equal, for which of equal ones is trimmed is not defined.
    """
    rng = np.random.default_rng(0)
    with open_checkpoint("toolkit:base") as checkpoint:
        layers = [checkpoint.tensor(f"model.layers.{i}.mlp.up_proj.weight").float().numpy() for i in range(4)]
    changes = [(layer - layers[0]) * rng.uniform(0.1, 0.101, layer.shape) for layer in layers[1:]]
    return np.stack([layers[0], *(layers[0] + change for change in changes)]).astype(np.float32)


@pytest.mark.parametrize("method", CASES)
def test_method(method, projections):
    count, parameters = CASES[method]
    base, tuned = projections[0], projections[1 : 1 + count]
    takes = load_method(method).takes
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in parameters.items()}
    if takes == "weights" and count == 3:
        tensors, index, x, offset = tuned, None, tuned, 0.0
    elif takes == "weights":
        tensors, index, x, offset = projections[: count + 1], 0, projections[: count + 1], 0.0
    else:
        tensors, index, x, offset = projections[: count + 1], 0, tuned - base, base
    exact = [torch.from_numpy(t.astype(np.float64)) for t in tensors]  # `arcee_fusion` is mostly rounding below
    wanted = merge_tensors(exact, method, parameters=given, base_index=index)
    got = run(method, x, **parameters) + offset
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-6)
