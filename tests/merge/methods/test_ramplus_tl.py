"""`ramplus_tl` against a loop in float64, and against mergekit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import Example, run
from tests.merge.methods.test_ram import expected_ram, sparse

EXAMPLE = Example({"epsilon": 0.5, "r": 0.3}, neutral={"epsilon": 0.0}, homogeneous=False)


def gains(x: np.ndarray, epsilon: float, r: float, alpha: float) -> np.ndarray:
    """Count the elements of `[M, N]` that each model changes alone and with others."""
    changed = np.abs(x) > epsilon
    several = changed.sum(axis=0) > 1
    ratio = [np.count_nonzero(c & several) / max(np.count_nonzero(c & ~several), epsilon or 1) for c in changed]
    return 1 + r * np.clip(ratio, 0, alpha)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.7])
@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.5, 1.0), (-0.3, 10.0)])
def test_closed_form(epsilon, r, alpha):
    x = sparse((3000,))
    got = run("ramplus_tl", x, epsilon=epsilon, r=r, alpha=alpha)
    expected = expected_ram(x, epsilon, gains(x, epsilon, r, alpha))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_gains_are_those_of_the_whole_tensor():
    # The first slice of 65,536 elements is changed by one model alone, the second by two.
    x = np.zeros((2, 131_072), np.float32)
    x[0] = 1
    x[1, 65_536:] = 3
    got = run("ramplus_tl", x, r=0.5, alpha=10.0)
    np.testing.assert_allclose(got, np.where(np.arange(131_072) < 65_536, 1.5, 2), rtol=1e-6)


@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.5, 3.0)])
@pytest.mark.parametrize("share", [(0.4, 0.6, 0.2), (0.1, 0.05, 0.02)])
def test_mergekit(r, alpha, share):
    from mergekit.merge_methods import merge_tensors

    x = sparse((50, 40), share)
    shared = {"epsilon": 1e-5, "r": r, "alpha": alpha}
    tensors = [torch.zeros(50, 40), *map(torch.from_numpy, x)]
    expected = merge_tensors(tensors, "ramplus_tl", parameters=shared, base_index=0)
    np.testing.assert_allclose(run("ramplus_tl", x, **shared), expected.numpy(), rtol=1e-5, atol=1e-7)
