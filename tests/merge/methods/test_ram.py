"""`ram` against a loop in float64, and against mergekit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import Example, run

RNG = np.random.default_rng(0)
EXAMPLE = Example({"epsilon": 0.5}, neutral={"epsilon": 0.0}, homogeneous=False)


def sparse(shape: tuple[int, ...], share: tuple[float, ...] = (0.4, 0.6, 0.2)) -> np.ndarray:
    """Deltas of three models that change only some elements."""
    changed = RNG.random((3, *shape)) < np.reshape(share, (3, *[1] * len(shape)))
    return (RNG.standard_normal((3, *shape)) * changed).astype(np.float32)


def expected_ram(x: np.ndarray, epsilon: float, gain: np.ndarray) -> np.ndarray:
    """RAM of `[M, N]` one element at a time; `gain` multiplies what one model alone changed."""
    x = x.astype(np.float64)
    out = np.zeros(x.shape[1])
    for j, column in enumerate(x.T):
        who = np.flatnonzero(np.abs(column) > epsilon)
        if len(who) == 1:
            out[j] = column[who[0]] * gain[who[0]]
        elif len(who):
            out[j] = column[who].sum() / len(who)
    return out


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.7])
def test_closed_form(epsilon):
    x = sparse((3000,))
    expected = expected_ram(x, epsilon, np.ones(3))
    np.testing.assert_allclose(run("ram", x, epsilon=epsilon), expected, rtol=1e-5, atol=1e-7)


def test_a_change_of_epsilon_is_none():
    x = np.array([[0.25, 0.5, 0.0], [0.5, 0.0, -0.25]])
    np.testing.assert_array_equal(run("ram", x, epsilon=0.25), [0.5, 0.5, 0])


@pytest.mark.parametrize("epsilon", [1e-5, 0.7])
def test_mergekit(epsilon):
    from mergekit.merge_methods import merge_tensors

    x = sparse((50, 40))
    tensors = [torch.zeros(50, 40), *map(torch.from_numpy, x)]
    expected = merge_tensors(tensors, "ram", parameters={"epsilon": epsilon}, base_index=0)
    np.testing.assert_allclose(run("ram", x, epsilon=epsilon), expected.numpy(), rtol=1e-5, atol=1e-7)
