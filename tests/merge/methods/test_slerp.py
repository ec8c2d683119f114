"""`slerp` against its closed form in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merge.laws import Example, run

RNG = np.random.default_rng(0)
EXAMPLE = Example({"t": 0.3}, models=2, neutral={"t": 0.3}, turned={"t": 0.7})


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("case", ["random", "parallel", "antipodal", "zero", "orthogonal"])
def test_slerp(case, t):
    a = RNG.standard_normal(900)
    b = {
        "random": RNG.standard_normal(900) * 2,
        "parallel": a * 1.5,
        "antipodal": -a,
        "zero": np.zeros(900),
        "orthogonal": np.concatenate([a[450:], -a[:450]]),
    }[case]
    cosine = a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30) if b.any() else 1.0
    if abs(cosine) > 0.9995:
        expected = (1 - t) * a + t * b
    else:
        angle = np.arccos(cosine)
        expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    got = run("slerp", np.stack([a, b]), t=t)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
