"""`passthrough` against multiplication, and against mergekit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import Example, run, settings
from toolkit.merge.method import load_method

RNG = np.random.default_rng(0)
EXAMPLE = Example({"scale": (0.5,)}, models=1, neutral={})


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.5, 0.1])
def test_passthrough(scale):
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((1, 40, 30)).astype(np.float32)
    got = run("passthrough", x, scale=(scale,))
    np.testing.assert_array_equal(got, x[0] * np.float32(scale))
    expected = merge_tensors([torch.from_numpy(x[0])], "passthrough", parameters={"scale": [scale]})
    np.testing.assert_array_equal(got, expected.numpy())


def test_without_a_scale_the_model_is_copied():
    x = RNG.standard_normal((1, 40, 30)).astype(np.float32)
    np.testing.assert_array_equal(run("passthrough", x), x[0])


@pytest.mark.parametrize(("scale", "expected"), [(1.0, [1.0]), (0.5, None)])
def test_only_an_unscaled_model_is_its_base_and_its_delta(scale, expected):
    method = load_method("passthrough")
    params = settings("passthrough", {"scale": (scale,)}, 1)
    assert method.coefficients(params) == expected
    assert method.idempotent(params) == (expected is not None)
