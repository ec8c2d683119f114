"""`ties` against float64 one element at a time, against mergekit and against PEFT, each where its preset says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties

from tests.merge.laws import WEIGHTS, Arrays, Example, run, settings
from toolkit.merge.method import load_method

RNG = np.random.default_rng(0)
EXAMPLE = Example(
    {"weight": WEIGHTS, "density": (0.4,) * 3},
    neutral={"weight": (1 / 3,) * 3, "density": (1.0,) * 3},
)


def expected_ties(
    x: np.ndarray, weights: list[float], density: list[float], scale: float, normalize: bool
) -> np.ndarray:
    """TIES in float64, one element at a time."""
    x = x.astype(np.float64)
    kept = np.zeros_like(x)
    for i, row in enumerate(x):
        keep = max(1, int(density[i] * len(row)))
        order = sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))[:keep]
        kept[i, order] = row[order]
    out = np.zeros(x.shape[1])
    for j in range(x.shape[1]):
        column = [w * v for w, v in zip(weights, kept[:, j], strict=True)]
        sign = 1 if sum(column) >= 0 else -1
        agree = [(w, v) for w, v in zip(weights, column, strict=True) if v * sign > 0]
        total = sum(v for _, v in agree)
        divisor = sum(w for w, _ in agree)
        out[j] = scale * (total / divisor if normalize and divisor else total)
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.2), (1.0, 0.5, -1.0)])
def test_ties(weights, normalize):
    x = RNG.standard_normal((3, 400))
    density = (0.2, 0.5, 1.0)
    got = run("ties", x, weight=weights, density=density, normalize=normalize, **{"lambda": 0.9})
    expected = expected_ties(x.astype(np.float32), list(weights), list(density), 0.9, normalize)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_ties_equals_peft_at_equal_weights():
    # At other weights PEFT elects the sign before weighting and divides by a count, which is another algorithm.
    x = RNG.standard_normal((3, 10000)).astype(np.float32)
    expected = peft_ties([torch.from_numpy(row) for row in x], torch.ones(3), 0.2)
    got = run("ties", x, weight=(1.0,) * 3, density=(0.2,) * 3)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_ties_on_values_that_are_mostly_equal():
    # Deltas of bfloat16 models lie on a grid: many magnitudes are equal, and many are zero.
    x = RNG.integers(-2, 3, (3, 5000)).astype(np.float32) / 4
    for density in (0.001, 0.1, 0.5, 0.9):
        got = run("ties", x, weight=(1.0, 0.7, 0.4), density=(density,) * 3)
        np.testing.assert_allclose(
            got, expected_ties(x, [1.0, 0.7, 0.4], [density] * 3, 1.0, True), rtol=1e-5, atol=1e-6
        )


def expected_with_choices(x, weights, cuts, *, vote, zero, divisor):
    """TIES in float64 with every choice, from the elements that each model keeps."""
    kept = np.where(cuts, x, 0.0)
    out = np.zeros(x.shape[1])
    for j in range(x.shape[1]):
        column = kept[:, j]
        votes = {"weighted": weights @ column, "total": column.sum(), "frequency": np.sign(column).sum()}[vote]
        sign = np.sign(votes) or zero
        agree = [i for i in range(len(x)) if weights[i] * column[i] * sign > 0]
        total = sum(weights[i] * column[i] for i in agree)
        count = {"weights": sum(weights[i] for i in agree), "count": len(agree), "none": 1}[divisor]
        out[j] = total / count if agree else 0
    return out


def top(x: np.ndarray, keep: int) -> np.ndarray:
    order = np.lexsort((np.arange(len(x)), -np.abs(x)))
    mask = np.zeros(len(x), bool)
    mask[order[:keep]] = True
    return mask


@pytest.mark.parametrize("vote", ["weighted", "total", "frequency"])
@pytest.mark.parametrize("zero_vote", ["plus", "majority"])
@pytest.mark.parametrize("divisor", ["weights", "count"])
def test_every_choice(vote, zero_vote, divisor):
    # Values on a grid, more of them negative, so that votes of 0 occur and the majority is minus.
    x = RNG.integers(-5, 4, (3, 600)).astype(np.float64) / 4
    weights = np.array([0.5, 0.25, 0.75])  # no vote is rounded
    cuts = np.stack([top(row, 360) for row in x])
    kept = np.where(cuts, x, 0)
    zero = 1.0 if zero_vote == "plus" or np.sign(kept.sum(axis=0)).sum() >= 0 else -1.0
    assert (kept.sum(axis=0) == 0).any()
    expected = expected_with_choices(x, weights, cuts, vote=vote, zero=zero, divisor=divisor)
    choices = {"vote": vote, "zero_vote": zero_vote, "divisor": divisor}
    got = run("ties", x, weight=tuple(weights), density=(0.6,) * 3, **choices)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_peft_preset_is_peft(weights, method):
    x = RNG.standard_normal((3, 5000)).astype(np.float32)
    expected = peft_ties([torch.from_numpy(row) for row in x], torch.tensor(weights), 0.2, method)
    got = run("ties", x, preset="peft", vote=method, weight=weights, density=(0.2,) * 3)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("normalize", [True, False])
def test_mergekit_preset_is_mergekit(weights, normalize):
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((3, 50, 40))
    tensors = [torch.zeros(50, 40, dtype=torch.float64), *map(torch.from_numpy, x)]
    shared = {"normalize": normalize, "lambda": 0.7}
    own = {"weight": list(weights), "density": [0.3] * 3}
    expected = merge_tensors(tensors, "ties", parameters=shared | own, base_index=0)
    got = run("ties", x, weight=weights, density=(0.3,) * 3, **shared)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_paper_trims_over_the_whole_model():
    """As the paper's code does: one threshold per model for all its tensors, here of very different size."""
    parts = [RNG.standard_normal((2, 400)) * scale for scale in (0.1, 1.0, 3.0)]
    loaded = load_method("ties")
    params = settings("ties", {"preset": "paper", "density": (0.25, 0.5)}, 2)
    streams = [(Arrays(x, name=f"t{i}"), params) for i, x in enumerate(parts)]
    whole = np.concatenate(parts, axis=1)
    cuts = np.stack([top(row, int(d * 1200)) for row, d in zip(whole, (0.25, 0.5), strict=True)])
    expected = expected_with_choices(whole, np.ones(2), cuts, vote="total", zero=1.0, divisor="count")
    for i, ((tensor, _), surveyed) in enumerate(zip(streams, loaded.survey(streams), strict=True)):
        tensor.surveyed = surveyed
        state = loaded.prepare(tensor, params)
        got = np.concatenate([loaded.combine(c, params, state, start) for start, c in tensor.stacked()])
        np.testing.assert_allclose(got, expected[400 * i : 400 * (i + 1)], rtol=1e-5, atol=1e-6)
    assert not expected[:400].any(), "the small tensor is trimmed away"
