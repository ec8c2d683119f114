"""APGR, CPT and calibration against brute force over every order of ties."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest

from toolkit.routing.curves import calibration_error, curve

RNG = np.random.default_rng(0)


def brute_force(scores, weak, strong):
    """Return the mean over all orders that the scores allow of the mean quality at every count of strong calls."""
    count = len(scores)
    orders = [o for o in permutations(range(count)) if all(scores[a] >= scores[b] for a, b in pairwise(o))]
    taken = [[np.isin(np.arange(count), order[:k]) for k in range(count + 1)] for order in orders]
    return np.where(taken, strong, weak).mean(axis=(0, 2))


@pytest.mark.parametrize("seed", range(6))
def test_curve_is_the_mean_over_the_orders_of_ties(seed):
    rng = np.random.default_rng(seed)
    weak, strong = rng.integers(0, 2, (2, 6)).astype(float)
    strong[:2], weak[:2] = 1, 0
    scores = rng.integers(0, 3, 6).astype(float)
    expected = brute_force(scores, weak, strong)
    got = curve(scores, weak, strong)
    np.testing.assert_allclose([got.at(k / 6) for k in range(7)], expected, atol=1e-12)
    recovered = (expected - expected[0]) / (expected[-1] - expected[0])
    assert got.apgr() == pytest.approx(np.trapezoid(recovered, dx=1 / 6))
    fine = np.linspace(0, 1, 60001)
    first = fine[np.interp(fine, np.linspace(0, 1, 7), recovered) >= 0.8 - 1e-9][0]
    assert got.cpt(0.8) == pytest.approx(first, abs=1e-4)


def test_random_choice_is_the_straight_line():
    weak, strong = np.array([0.0, 1, 0, 0]), np.array([1.0, 1, 0, 1])
    line = curve(np.zeros(4), weak, strong)
    assert (line.apgr(), line.cpt(0.5), line.cpt(0.8)) == pytest.approx((0.5, 0.5, 0.8))


def test_oracle_is_the_best_curve_and_its_reverse_the_worst():
    weak, strong = RNG.integers(0, 2, (2, 400)).astype(float)
    strong[:100] = 1
    best, worst = (curve(sign * (strong - weak), weak, strong) for sign in (1, -1))
    assert best.apgr() + worst.apgr() == pytest.approx(1)
    # A rise to all that can be gained, a plain, and a fall to the strong expert's own quality.
    gained, lost = (strong > weak).mean(), (strong < weak).mean()
    gap = gained - lost
    area = gained * gained / 2 + (1 - gained - lost) * gained + lost * (gained + gap) / 2
    assert best.apgr() == pytest.approx(area / gap)
    assert all(curve(RNG.random(400), weak, strong).apgr() <= best.apgr() for _ in range(20))


def test_equally_good_experts_leave_no_gap():
    same = curve(np.arange(4.0), np.array([0.0, 1, 0, 1]), np.array([1.0, 0, 1, 0]))
    assert np.isnan(same.apgr())
    assert np.isnan(same.cpt(0.5))


def test_calibration_by_hand():
    predicted = np.array([0.1, 0.1, 0.9, 0.9])
    assert calibration_error(predicted, np.array([0.0, 0, 1, 1]), bins=2) == pytest.approx(0.1)
    assert calibration_error(predicted, np.array([1.0, 1, 1, 1]), bins=2) == pytest.approx((0.9 + 0.1) / 2)
    sure = RNG.random(20000)
    assert calibration_error(sure, (RNG.random(20000) < sure).astype(float)) < 0.02
