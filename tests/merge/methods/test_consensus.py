"""`consensus` against its definition in float64, element by element, with the oracles of its paper."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.merge.laws import WEIGHTS, Arrays, Example, run, settings
from toolkit.merge.method import load_method
from toolkit.merge.methods.consensus import tall_mask

RNG = np.random.default_rng(0)
EXAMPLE = Example({"weight": WEIGHTS, "mask_lambda": (0.2, 0.4, 0.6), "k": 1}, neutral={"weight": (1 / 3,) * 3})

LAMBDAS = (0.2, 0.6, 1.0, 5.0)


def grid(*shape: int) -> np.ndarray:
    """Random values on a grid, so that their sums, and products with the lambdas of the tests, are exact."""
    return (RNG.integers(-64, 65, shape) / 64).astype(np.float32)


def expected_consensus(x: np.ndarray, merged: np.ndarray, mask_lambda: np.ndarray, k: int) -> np.ndarray:
    """Count for each element the tasks whose mask holds it."""
    out = np.zeros(x.shape[1])
    for j in range(x.shape[1]):
        votes = sum(abs(v[j]) > m * abs(merged[j] - v[j]) for v, m in zip(x, mask_lambda, strict=True))
        out[j] = merged[j] if votes >= k else 0
    return out


def trimmed(x: np.ndarray, density: float) -> np.ndarray:
    out = np.zeros_like(x)
    for row, kept in zip(x, out, strict=True):
        order = np.lexsort((np.arange(len(row)), -np.abs(row)))[: int(density * len(row))]
        kept[order] = row[order]
    return out


def expected_ties(x: np.ndarray, density: float) -> np.ndarray:
    """TIES as its authors have it: the sum of what agrees with the sign of the sum, or with the majority's at 0."""
    x = trimmed(x, density)
    sign = np.sign(x.sum(axis=0))
    sign[sign == 0] = 1 if sign.sum() >= 0 else -1
    return (x * (x * sign > 0)).sum(axis=0)


@pytest.mark.system("tall_masks")
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("aggregate", ["sum", "ties"])
@pytest.mark.parametrize("mask_lambda", [(0.5, 0.5, 0.5), (0.25, 0.5, 2.0), (2.0, 3.0, 4.0)])
def test_consensus(k, aggregate, mask_lambda):
    x = grid(3, 900).astype(np.float64)
    merged = x.sum(axis=0) if aggregate == "sum" else expected_ties(x, 0.3)
    expected = expected_consensus(x, merged, np.array(mask_lambda), k)
    given = {"k": k, "mask_lambda": mask_lambda, "aggregate": aggregate, "density": (0.3,) * 3, "lambda": 0.75}
    np.testing.assert_allclose(run("consensus", x, **given), 0.75 * expected, rtol=1e-6)
    if k == 2 or (k == 1 and min(mask_lambda) > 1):
        assert 0 < np.count_nonzero(expected) < np.count_nonzero(merged), "the mask has work to do"


def test_defaults_are_two_masks_at_the_middle_of_the_published_lambdas():
    x = RNG.standard_normal((3, 900)).astype(np.float32)
    expected = expected_consensus(x, x.sum(axis=0), np.full(3, np.float32(0.4)), 2)
    np.testing.assert_allclose(run("consensus", x), expected, rtol=1e-6)


def test_weights_are_of_the_task_vectors():
    x = grid(3, 900)
    weights = (0.5, -0.25, 2.0)
    weighted = np.array(weights)[:, None] * x.astype(np.float64)
    expected = expected_consensus(weighted, weighted.sum(axis=0), np.full(3, 0.5), 2)
    got = run("consensus", x, weight=weights, mask_lambda=(0.5,) * 3)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.system("tall_masks")
def test_the_mask_compares_with_the_unscaled_sum():
    x = grid(2, 500)
    whole = run("consensus", x, k=1)
    np.testing.assert_allclose(run("consensus", x, k=1, **{"lambda": 0.3}), 0.3 * whole, rtol=1e-6)


@pytest.mark.system("tall_masks")
@pytest.mark.parametrize("mask_lambda", LAMBDAS)
def test_mask_of_one_task_is_the_support_of_its_vector(mask_lambda):
    x = grid(1, 500) * (RNG.random((1, 500)) < 0.5)
    np.testing.assert_array_equal(tall_mask(x[0], x[0], mask_lambda), x[0] != 0)
    np.testing.assert_array_equal(run("consensus", x, k=1, mask_lambda=(mask_lambda,)), x[0])


@pytest.mark.system("tall_masks")
@pytest.mark.parametrize("mask_lambda", LAMBDAS)
def test_tasks_of_disjoint_supports_are_recovered_exactly(mask_lambda):
    owner = RNG.integers(0, 3, 900)
    x = grid(3, 900) * (owner == np.arange(3)[:, None])
    merged = x.sum(axis=0)
    for task in x:
        np.testing.assert_array_equal(tall_mask(task, merged, mask_lambda) * merged, task)
    np.testing.assert_array_equal(run("consensus", x, k=1, mask_lambda=(mask_lambda,)), merged)
    np.testing.assert_array_equal(run("consensus", x, k=2, mask_lambda=(mask_lambda,)), 0)


@pytest.mark.system("tall_masks")
def test_no_masks_give_task_arithmetic_bit_for_bit():
    x = RNG.standard_normal((3, 70_000))
    for given in ({}, {"weight": WEIGHTS, "lambda": 0.7}):
        got, expected = run("consensus", x, k=0, **given), run("task_arithmetic", x, **given)
        assert got.tobytes() == expected.tobytes()
    assert load_method("consensus").coefficients(settings("consensus", {"k": 1}, 3)) is None


@pytest.mark.system("tall_masks")
def test_no_masks_give_ties_bit_for_bit():
    x = RNG.standard_normal((3, 5000))
    given = {"weight": WEIGHTS, "density": (0.2, 0.3, 0.4), "trim": "tensor"}
    got = run("consensus", x, k=0, aggregate="ties", **given)
    assert got.tobytes() == run("ties", x, preset="paper", normalize=False, **given).tobytes()


@pytest.mark.system("tall_masks")
@pytest.mark.parametrize("aggregate", ["sum", "ties"])
def test_more_masks_than_tasks_give_the_base(aggregate):
    x = RNG.standard_normal((3, 500))
    np.testing.assert_array_equal(run("consensus", x, k=4, aggregate=aggregate), 0)


@pytest.mark.system("tall_masks")
def test_masks_shrink_as_their_lambda_grows():
    x = RNG.standard_normal((4, 2000)).astype(np.float32)
    merged = x.sum(axis=0)
    for task in x:
        masks = [tall_mask(task, merged, value) for value in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0, 5.0)]
        assert masks[0].all()
        for larger, smaller in pairwise(masks):
            assert not (smaller & ~larger).any()
            assert smaller.sum() < larger.sum()


def test_ties_trims_over_the_whole_model():
    """As the authors' code does, which flattens the model first; tensors that are only summed do not count."""
    parts = [grid(2, 400) * scale for scale in (1, 2, 4)]
    summed = grid(2, 400) * 64
    loaded = load_method("consensus")
    params = settings("consensus", {"aggregate": "ties", "density": (0.3,), "k": 1, "mask_lambda": (0.5,)}, 2)
    streams = [(Arrays(x, name=f"t{i}"), params) for i, x in enumerate(parts)]
    streams.insert(1, (Arrays(summed, name="summed"), settings("consensus", {"k": 1}, 2)))
    states = list(loaded.survey(streams))
    kept = np.split(trimmed(np.concatenate(parts, axis=1), 0.3), 3, axis=1)
    del streams[1], states[1]
    assert not kept[0].any(), "the small tensor is trimmed away"
    for (tensor, _), surveyed, rest in zip(streams, states, kept, strict=True):
        tensor.surveyed = surveyed
        state = loaded.prepare(tensor, params)
        got = np.concatenate([loaded.combine(c, params, state, start) for start, c in tensor.stacked()])
        merged = expected_ties(rest.astype(np.float64), 1.0)
        expected = expected_consensus(tensor.x.astype(np.float64), merged, np.full(2, 0.5), 1)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
