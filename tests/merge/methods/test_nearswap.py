"""`nearswap` against its definition, one element at a time, and against mergekit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import Example, run

RNG = np.random.default_rng(0)
EXAMPLE = Example({"t": 0.3}, models=2, neutral={"t": 0.3}, symmetric=False, homogeneous=False)


def expected_nearswap(base: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    out = np.empty(base.shape)
    for i, (a, b) in enumerate(zip(base.astype(np.float64), other.astype(np.float64), strict=True)):
        weight = min(1.0, t / abs(a - b)) if a != b else 1.0
        out[i] = weight * b + (1 - weight) * a
    return out


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 100.0])
def test_nearswap(t):
    x = RNG.standard_normal((2, 3000)).astype(np.float32)
    x[1, ::7] = x[0, ::7]
    got = run("nearswap", x, t=t)
    np.testing.assert_allclose(got, expected_nearswap(x[0], x[1], t), rtol=1e-6, atol=1e-7)
    near = np.abs(x[0] - x[1]) < t * (1 - 1e-3)
    np.testing.assert_array_equal(got[near], x[1][near])
    if t == 0:
        np.testing.assert_array_equal(got, x[0])


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5])
def test_nearswap_is_mergekits(t):
    # mergekit takes differences below 1e-6 as 1e-6, which matters for smaller `t` only.
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((2, 40, 30)).astype(np.float32)
    tensors = list(torch.from_numpy(x.astype(np.float64)))
    expected = merge_tensors(tensors, "nearswap", parameters={"t": t}, base_index=0).numpy()
    np.testing.assert_allclose(run("nearswap", x, t=t), expected, rtol=1e-6, atol=1e-7)


def test_tiny_differences():
    base = np.array([0.0, 0.0, 1e-9], np.float32)
    other = np.array([1e-8, -1e-8, 3e-9], np.float32)
    np.testing.assert_allclose(run("nearswap", np.stack([base, other]), t=4e-9), [4e-9, -4e-9, 3e-9], rtol=1e-6)
