"""`wudi` against the minimum of its objective in float64, and its Adam against torch's on the published loss."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from tests.merge.laws import WEIGHTS, Example, run, settings
from toolkit.merge.method import load_method

RNG = np.random.default_rng(0)
EXAMPLE = Example({"weight": WEIGHTS, "lambda": 0.8}, neutral={}, rtol=3e-5)

# As many inputs as rows, more inputs than all tasks have rows, and fewer.
SHAPES = [(15, 15), (4, 30), (30, 8), (1, 9), (9, 1)]


def loss(merged: np.ndarray, x: np.ndarray) -> float:
    """The objective as the paper states it."""
    return sum(float(np.square((merged - tau) @ tau.T).sum() / np.square(tau).sum()) for tau in x.astype(np.float64))


def gradient(merged: np.ndarray, x: np.ndarray) -> np.ndarray:
    parts = [2 * (merged - tau) @ tau.T @ tau / np.square(tau).sum() for tau in x.astype(np.float64)]
    return np.sum(parts, axis=0)


def expected_wudi(x: np.ndarray) -> np.ndarray:
    """The least-squares solution nearest to the sum: each task asks for `(step @ tau^T = (tau - sum) tau^T) / norm`."""
    start = x.sum(axis=0)
    norms = [np.linalg.norm(tau) for tau in x]
    left = np.concatenate([tau / norm for tau, norm in zip(x, norms, strict=True)])
    right = np.concatenate([tau @ (tau - start).T / norm for tau, norm in zip(x, norms, strict=True)])
    return start + np.linalg.lstsq(left, right, rcond=1e-10)[0].T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_exact(shape, models):
    x = RNG.standard_normal((models, *shape)).astype(np.float32).astype(np.float64)
    got = run("wudi", x, **{"lambda": 1.5})
    expected = 1.5 * expected_wudi(x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_vanishes_at_the_exact_solution(shape):
    x = RNG.standard_normal((3, *shape)).astype(np.float32)
    got = run("wudi", x).astype(np.float64)
    assert np.abs(gradient(got, x)).max() <= 1e-5 * np.abs(gradient(np.zeros(shape), x)).max()
    for _ in range(20):
        assert loss(got + 0.01 * RNG.standard_normal(shape), x) >= loss(got, x)


def test_weights_scale_the_task_vectors():
    x = RNG.standard_normal((3, 12, 10)).astype(np.float32)
    weights = np.array([0.5, 2.0, -1.0], np.float32)
    expected = expected_wudi((weights[:, None, None] * x).astype(np.float64))
    np.testing.assert_allclose(run("wudi", x, weight=tuple(weights.tolist())), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_task_gives_its_task_vector(shape):
    x = RNG.standard_normal((1, *shape)).astype(np.float32)
    np.testing.assert_allclose(run("wudi", x), x[0], rtol=1e-6)
    # Adam divides rounding errors by themselves: at the minimum it swings by its learning rate.
    np.testing.assert_allclose(run("wudi", x, solver="adam", steps=50), x[0], rtol=1e-6, atol=2e-5)


def test_tasks_in_orthogonal_inputs_add_up_exactly():
    inputs = np.linalg.qr(RNG.standard_normal((20, 20)))[0]
    x = np.stack([RNG.standard_normal((9, 6)) @ inputs[:6], RNG.standard_normal((9, 8)) @ inputs[6:14]])
    np.testing.assert_allclose(run("wudi", x), x.sum(axis=0), atol=1e-5)


def test_directions_of_rounding_do_not_move_the_solution():
    """Task vectors of rank 3 hold rounding errors in all others; there the solution stays at the sum of them."""
    x = np.einsum("tnr,trk->tnk", RNG.standard_normal((2, 40, 3)), RNG.standard_normal((2, 3, 30)))
    np.testing.assert_allclose(run("wudi", x), expected_wudi(x), atol=1e-4)


def test_weak_directions_count():
    """Inputs that the tasks respond to ten thousand times less than to others are solved for all the same."""
    x = RNG.standard_normal((2, 40, 30)) * np.logspace(0, -4, 30)
    got, expected = run("wudi", x), expected_wudi(x)
    np.testing.assert_allclose(got[:, -1], expected[:, -1], rtol=1e-3, atol=1e-3 * np.abs(expected[:, -1]).max())
    assert not np.allclose(expected[:, -1], x[:, :, -1].sum(axis=0), rtol=0.1)


def test_a_task_that_does_not_change_the_matrix_has_no_say():
    x = RNG.standard_normal((3, 12, 20))
    x[1] = 0
    np.testing.assert_allclose(run("wudi", x), expected_wudi(x[[0, 2]]), rtol=1e-4, atol=1e-5)


def published(x: np.ndarray, steps: int, rate: float) -> np.ndarray:
    """Adam of torch on the loss, from the sum of the task vectors."""
    tasks = torch.from_numpy(x)
    merged = torch.nn.Parameter(tasks.sum(dim=0))
    optimizer = torch.optim.Adam([merged], lr=rate)
    norms = tasks.square().sum(dim=(1, 2))
    for _ in range(steps):
        optimizer.zero_grad()
        squares = ((merged - tasks) @ tasks.mT).square().sum(dim=(1, 2))
        (squares / norms).sum().backward()
        optimizer.step()
    return merged.detach().numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("steps", "rate", "size"), [(300, 1e-5, 0.01), (40, 1e-2, 1.0), (0, 1e-5, 1.0)])
def test_adam_is_that_of_torch(shape, steps, rate, size):
    x = (size * RNG.standard_normal((3, *shape))).astype(np.float32).astype(np.float64)
    got = run("wudi", x, solver="adam", steps=steps, learning_rate=rate)
    np.testing.assert_allclose(got, published(x, steps, rate), rtol=1e-5, atol=1e-7 * size)


def test_adam_falls_towards_the_exact_solution():
    x = 0.01 * RNG.standard_normal((3, 20, 24))
    losses = [loss(run("wudi", x, solver="adam", steps=steps, learning_rate=1e-4), x) for steps in (0, 30, 100, 1000)]
    least = loss(run("wudi", x), x)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * least
    assert losses[-1] == pytest.approx(least, rel=1e-3)
    assert losses[-1] > least


def test_a_stack_is_merged_matrix_by_matrix_and_vectors_are_averaged():
    x = RNG.standard_normal((3, 2, 3, 6, 5)).astype(np.float32)
    got = run("wudi", x, weight=WEIGHTS)
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(got[place], run("wudi", x[:, *place], weight=WEIGHTS))
    for params, vectors in (({}, x[:, 0, 0, 0]), ({"average": True}, x)):
        expected = np.tensordot(WEIGHTS, vectors.astype(np.float64), 1) * 2 / 3
        got = run("wudi", vectors, weight=WEIGHTS, **params, **{"lambda": 2.0})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (60, 400), (4, 120, 90), (1, 5000), (5000, 1), (5000,)])
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("solver", ["exact", "adam"])
def test_memory_is_bounded_as_declared(shape, models, solver):
    loaded = load_method("wudi")
    params = settings("wudi", {"solver": solver, "steps": 3}, models)
    x = RNG.standard_normal((models, *shape)).astype(np.float32)
    tracemalloc.start()
    loaded.combine(x, params, None, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= loaded.memory(shape, models)
