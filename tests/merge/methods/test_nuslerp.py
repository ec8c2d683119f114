"""`nuslerp` against its closed form in float64, vector by vector, and against mergekit in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import Example, run
from toolkit.checkpoints import deltas

RNG = np.random.default_rng(0)
EXAMPLE = Example({"weight": (0.7, 0.3)}, models=2, neutral={"weight": (0.7, 0.3)})

SHAPES = [(1,), (12,), (6, 1), (1, 6), (12, 7), (3, 4, 5), (2, 1, 3), (300, 5), (3, 20, 16), ()]
WAYS = [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}]


def arc(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Interpolate two vectors in float64."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = np.clip(a @ b / norms, -1, 1) if norms else 1.0
    if np.sqrt(1 - cosine**2) <= 1e-4:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def expected_nuslerp(x: np.ndarray, t: float, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False):
    a, b = x.astype(np.float64)
    if nuslerp_flatten or a.ndim == 0:
        return arc(a.reshape(-1), b.reshape(-1), t).reshape(a.shape)
    axis = 0 if nuslerp_row_wise else a.ndim - 1
    both = np.moveaxis(np.stack([a, b]), axis + 1, -1)
    out = np.empty(both.shape[1:])
    for index in np.ndindex(out.shape[:-1]):
        out[index] = arc(both[0][index], both[1][index], t)
    return np.moveaxis(out, -1, axis)


@pytest.mark.parametrize("chunk", [7, 100, 65536])
@pytest.mark.parametrize("way", WAYS, ids=["whole", "last dimension", "first dimension"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nuslerp(shape, way, chunk, monkeypatch):
    monkeypatch.setattr(deltas, "CHUNK", chunk)
    x = RNG.standard_normal((2, *shape)).astype(np.float32)
    got = run("nuslerp", x, weight=(1.0, 3.0), **way)
    np.testing.assert_allclose(got, expected_nuslerp(x, 0.75, **way), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=["whole", "last dimension", "first dimension"])
@pytest.mark.parametrize("shape", [(12,), (12, 7), (3, 4, 5), (6, 1)], ids=str)
def test_nuslerp_is_mergekits(shape, way, base):
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((2, *shape)).astype(np.float32).astype(np.float64)
    tensors = list(torch.from_numpy(x))
    if base:
        tensors.insert(0, torch.zeros(shape, dtype=torch.float64))
    parameters = {"weight": [0.6, 0.2], **way}
    expected = merge_tensors(tensors, "nuslerp", parameters=parameters, base_index=0 if base else None).numpy()
    got = run("nuslerp", x, weight=(0.6, 0.2), **way)
    # Where a row has one element the two are on one line, and both tools take it as straight.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS, ids=["whole", "last dimension", "first dimension"])
def test_vectors_on_one_line_and_zero_ones_are_interpolated_straight(way):
    # A zero vector has no direction; mergekit takes it as orthogonal and gives sin((1-t) pi/2) of the other.
    a = RNG.standard_normal((8, 6)).astype(np.float32)
    for b in (1.5 * a, -a, -0.5 * a, np.zeros_like(a), a * np.float32(1 + 1e-6)):
        got = run("nuslerp", np.stack([a, b]), weight=(3.0, 1.0), **way)
        np.testing.assert_allclose(got, 0.75 * a + 0.25 * b, rtol=1e-5, atol=1e-6)


def test_small_deltas_are_interpolated_as_large_ones():
    # mergekit in effect divides by at least 1e-7, and so changes the angle of smaller deltas.
    x = RNG.standard_normal((2, 4, 4)).astype(np.float32)
    way = {"weight": (0.5, 0.5), "nuslerp_flatten": False}
    np.testing.assert_allclose(run("nuslerp", x * 2.0**-60, **way) * 2.0**60, run("nuslerp", x, **way), rtol=1e-6)


@pytest.mark.parametrize("weight", [(1.0, -1.0), (0.0, 0.0)])
def test_weights_that_sum_to_zero_count_as_equal(weight):
    x = RNG.standard_normal((2, 5, 4)).astype(np.float32)
    np.testing.assert_array_equal(run("nuslerp", x, weight=weight), run("nuslerp", x, weight=(1.0, 1.0)))
