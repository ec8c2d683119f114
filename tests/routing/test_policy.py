"""Policies by hand, and budgets against all prices."""

from __future__ import annotations

import json

import numpy as np
import pytest

from toolkit.errors import SpecError
from toolkit.routing.policy import PolicySpec, counted, decide, price_for, spent

NAMES = ("weak", "middle", "strong")
SCORES = np.array([[0.9, 0.8, 0.1], [0.2, 0.5, 0.9], [0.3, 0.3, 0.3], [0.1, 0.7, 0.75]], np.float32)


def chosen(**policy):
    return [choice.expert for choice in decide(SCORES, NAMES, PolicySpec(**policy))]


def test_best_expert_and_of_equals_the_first():
    assert chosen() == ["weak", "strong", "weak", "strong"]
    first = decide(SCORES, NAMES, PolicySpec())[0]
    assert first.weights == {"weak": 1.0}
    assert first.margin == pytest.approx(0.1)
    assert counted(decide(SCORES, NAMES, PolicySpec())) == {"strong": 2, "weak": 2}


def test_several_experts_share_a_request():
    choice = decide(SCORES, NAMES, PolicySpec(top=2, temperature=0.5))[0]
    ratio = np.exp((0.9 - 0.8) / 0.5)
    assert choice.weights == pytest.approx({"weak": ratio / (1 + ratio), "middle": 1 / (1 + ratio)}, rel=1e-5)


def test_cost_counts_against_a_score():
    costs = {"middle": 1.0, "strong": 2.0}
    assert chosen(costs=costs, price=0.06) == ["weak", "strong", "weak", "middle"]
    assert chosen(costs=costs, price=0.45) == ["weak", "weak", "weak", "middle"]
    assert chosen(costs=costs, price=9) == ["weak"] * 4


@pytest.mark.parametrize(
    ("policy", "reason"),
    [({"minimum": 0.5}, "below the minimum"), ({"confidence": 0.34, "temperature": 1}, "not confident")],
)
def test_fallback_where_nothing_fits(policy, reason):
    choices = decide(SCORES, NAMES, PolicySpec(fallback="base", **policy))
    assert [choice.reason == reason for choice in choices] == [False, False, True, False]
    assert choices[2].expert == "base"
    assert choices[2].weights == {"base": 1.0}
    json.dumps(choices[2].scores)


def test_prompts_out_of_scope_fall_back():
    choices = decide(SCORES, NAMES, PolicySpec(max_novelty=0.5), np.array([0.1, 0.6, 0.5, 0.9], np.float32))
    assert [choice.reason for choice in choices] == ["best", "out of scope", "best", "out of scope"]
    assert [choice.expert for choice in choices] == ["weak", "base", "weak", "base"]


@pytest.mark.parametrize("seed", range(5))
def test_budget_is_met_as_closely_as_any_price_meets_it(seed):
    rng = np.random.default_rng(seed)
    scores = rng.random((40, 4)).astype(np.float32)
    costs = np.array([0.0, 1.0, 2.5, 7.0])
    # Where two experts change places: between these prices nothing changes.
    places = [(scores[:, j] - scores[:, i]) / (costs[j] - costs[i]) for i in range(4) for j in range(i)]
    edges = np.sort(np.unique(np.concatenate(places).astype(np.float64)))
    between = np.concatenate([[edges[0] - 1], (edges[1:] + edges[:-1]) / 2, [edges[-1] + 1]])
    for budget in (0.1, 0.8, 1.7, 3.0):
        for exact in (False, True):
            price = price_for(scores, costs, budget, exact=exact)
            allowed = between if exact else [0.0, *between[between > 0]]
            wanted = max(s for s in (spent(scores, costs, p) for p in allowed) if s <= budget)
            assert spent(scores, costs, price) == pytest.approx(wanted)
            assert exact or price >= 0


def test_share_of_two_experts_is_exact_without_ties():
    scores = np.random.default_rng(0).random((1000, 2)).astype(np.float32)
    scores[:, 1] -= 0.9  # hardly ever the best
    for share in (0.1, 0.5, 0.9):
        assert spent(scores, np.array([0.0, 1.0]), price_for(scores, np.array([0.0, 1.0]), share, exact=True)) == share


def test_budget_that_buys_nothing():
    with pytest.raises(SpecError, match=r"a budget of 0\.5 per request, but the cheapest expert costs 1"):
        price_for(SCORES, np.array([1.0, 2.0, 3.0]), 0.5)
    assert price_for(SCORES, np.array([1.0, 1.0, 1.0]), 1) == 0
    assert price_for(SCORES, np.array([1.0, 2.0, 3.0]), 3) == 0
