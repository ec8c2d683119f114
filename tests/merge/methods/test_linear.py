"""`linear` against its closed form in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merge.laws import WEIGHTS, Example, run

RNG = np.random.default_rng(0)
EXAMPLE = Example({"weight": WEIGHTS}, neutral={"weight": WEIGHTS})


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(normalize):
    x = RNG.standard_normal((3, 500))
    w = np.array([0.5, 0.3, 0.7])
    expected = (w[:, None] * x).sum(0) / (w.sum() if normalize else 1)
    np.testing.assert_allclose(run("linear", x, weight=tuple(w), normalize=normalize), expected, rtol=1e-5, atol=1e-6)
