"""`arcee_fusion` against its definition in float64, and against mergekit in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import Arrays, Example, run, settings
from toolkit.checkpoints import deltas
from toolkit.merge.method import load_method

RNG = np.random.default_rng(0)
EXAMPLE = Example({}, models=2, neutral={}, symmetric=False, homogeneous=False)


def importance(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Importance of `[R, K]` in float64, row by row."""
    rows = []
    for a, b in zip(base.astype(np.float64), other.astype(np.float64), strict=True):
        p, q = (np.exp(v) / np.exp(v).sum() + 1e-8 for v in (b, a))
        rows.append(np.abs(b - a) * (p * (np.log(p) - np.log(q))).sum())
    return np.stack(rows)


def expected_fusion(base: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The merged weights, and how far an element is from the threshold, relatively."""
    found = importance(base, other)
    order = np.sort(found, axis=None)
    lower, median, upper = (order[int(q * (found.size - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (upper - lower)
    return np.where(found >= threshold, other, base), np.abs(found / threshold - 1)


def pair(shape: tuple[int, ...], change: float) -> np.ndarray:
    base = RNG.standard_normal(shape)
    return np.stack([base, base + change * RNG.standard_normal(shape)]).astype(np.float32)


@pytest.mark.parametrize("chunk", [32, 640, 65536])
@pytest.mark.parametrize("change", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("shape", [(1, 500), (7, 40), (100, 32), (600, 30)], ids=str)
def test_arcee_fusion(shape, change, chunk, monkeypatch):
    monkeypatch.setattr(deltas, "CHUNK", chunk)
    x = pair(shape, change)
    got = run("arcee_fusion", x)
    expected, distance = expected_fusion(*x)
    sure = distance > 1e-5  # the importance is rounded to float32
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(got[sure], expected[sure])
    assert 0.02 < (got == x[1]).mean() < 0.4


@pytest.mark.parametrize("shape", [(64,), (30, 40), (3, 8, 20), (9, 1), (1,)], ids=str)
def test_arcee_fusion_is_mergekits(shape):
    # In float64: in float32 and below the divergence of a small change is mostly rounding error in mergekit.
    from mergekit.merge_methods import merge_tensors

    x = pair(shape, 0.3)
    expected = merge_tensors(list(torch.from_numpy(x.astype(np.float64))), "arcee_fusion", base_index=0).numpy()
    np.testing.assert_allclose(run("arcee_fusion", x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 1000])
def test_threshold_is_exact(count):
    """Of one row, so that importance is the change times a constant; mergekit samples above a million elements."""
    x = pair((1, count), 0.5)
    params = settings("arcee_fusion", {}, 2)
    state = load_method("arcee_fusion").prepare(Arrays(x, "row"), params)
    change = np.sort(np.abs(x[1] - x[0]), axis=None) * state.divergences[0]
    lower, median, upper = (float(change[int(q * (count - 1))]) for q in (0.25, 0.5, 0.75))
    assert state.threshold == np.float32(median + 1.5 * (upper - lower))


def test_rows_that_do_not_change_stay():
    x = pair((40, 30), 0.1)
    x[1, 5:] = x[0, 5:]
    got = run("arcee_fusion", x)
    # More than three quarters of the importances are 0, and so is the threshold.
    np.testing.assert_array_equal(got, x[1])
