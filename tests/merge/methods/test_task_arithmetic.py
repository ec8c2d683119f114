"""`task_arithmetic` against its closed form in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merge.laws import WEIGHTS, Example, run

RNG = np.random.default_rng(0)
EXAMPLE = Example({"weight": WEIGHTS, "lambda": 0.7}, neutral={"weight": (1 / 3,) * 3})


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(normalize):
    x = RNG.standard_normal((3, 500))
    w = np.array([0.5, -0.3, 0.7])
    expected = 0.8 * (w[:, None] * x).sum(0) / (w.sum() if normalize else 1)
    got = run("task_arithmetic", x, weight=tuple(w), normalize=normalize, **{"lambda": 0.8})
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
