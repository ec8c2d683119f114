"""Composition of Experts: the mapping against brute force, the uncertain prompts, the categories."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from toolkit.errors import SpecError
from toolkit.routing.examples import Examples, labelled
from toolkit.routing.routers.coe import Params, fit, mapping, score

pytestmark = pytest.mark.system("coe")
NAMES = ("small", "middle", "large")
SIZES = {"small": 1.0, "middle": 3.0, "large": 7.0}


def categories(count=60, seed=0):
    """Three categories around a point each; which expert is good there differs, and the answers are noisy."""
    rng = np.random.default_rng(seed)
    which = np.arange(count) % 3
    x = (4 * np.eye(3)[which] + 0.3 * rng.standard_normal((count, 3))).astype(np.float32)
    chance = np.array([[0.9, 0.5, 0.6], [0.1, 0.7, 0.9], [0.3, 0.9, 0.5]])[which]
    quality = (rng.random((count, 3)) < chance).astype(float)
    cost = np.tile([1.0, 2.0, 3.0], (count, 1))
    return x, Examples(NAMES, [""] * count, quality, cost, [f"c{c}" for c in which], False)


def brute_force(quality, sizes, budget):
    """Return the largest total over all sets of experts within the budget."""
    count = quality.shape[1]
    sets = (s for r in range(1, count + 1) for s in combinations(range(count), r) if sizes[list(s)].sum() <= budget)
    return max(quality[:, list(chosen)].max(axis=1).sum() for chosen in sets)


@pytest.mark.parametrize("seed", range(6))
def test_mapping_is_brute_forces_and_grows_with_the_budget(seed):
    rng = np.random.default_rng(seed)
    quality, sizes = rng.random((7, 5)), rng.uniform(1, 10, 5)
    values = []
    for budget in np.linspace(sizes.min(), sizes.sum(), 9):
        chosen = mapping(quality, sizes, budget)
        values.append(quality[np.arange(7), chosen].sum())
        assert values[-1] == pytest.approx(brute_force(quality, sizes, budget), abs=1e-9)
        assert sizes[sorted(set(chosen))].sum() <= budget + 1e-9
    assert (np.diff(values) >= -1e-9).all()
    assert values[0] < values[-1]
    assert mapping(quality, sizes, sizes.sum()) == quality.argmax(axis=1).tolist()


def test_budget_below_every_size_is_an_error():
    x, examples = categories()
    with pytest.raises(SpecError, match=r"parameters\.budget: the smallest expert has size 1, which is more than 0\.5"):
        fit(x, examples, Params(sizes=SIZES, budget=0.5))
    with pytest.raises(SpecError, match=r"parameters\.sizes: a budget needs the size of large"):
        fit(x, examples, Params(sizes={"small": 1, "middle": 3}, budget=4))
    with pytest.raises(SpecError, match=r"parameters\.general: not an expert; did you mean 'large'"):
        fit(x, examples, Params(general="larg"))


def test_one_category_goes_to_the_best_single_expert():
    x, examples = categories()
    one = Examples(NAMES, examples.prompts, examples.quality, examples.cost, ["all"] * 60, False)
    chosen = score(x, fit(x, one, Params())).argmax(axis=1)
    assert set(chosen) == {examples.quality.mean(axis=0).argmax()}


def test_each_category_goes_to_the_expert_that_is_best_there():
    x, examples = categories(300)
    chosen = score(x, fit(x, examples, Params())).argmax(axis=1)
    means = examples.category_means()
    assert [NAMES[i] for i in chosen] == [NAMES[int(np.argmax(means[c]))] for c in examples.categories]
    assert len(set(chosen)) == 3


def test_budget_bounds_the_sizes_in_use_and_the_average_active_size():
    x, examples = categories(300)
    active = []
    for budget in (1.0, 4.0, 11.0):
        chosen = score(x, fit(x, examples, Params(sizes=SIZES, budget=budget))).argmax(axis=1)
        used = {NAMES[i] for i in chosen}
        assert sum(SIZES[name] for name in used) <= budget
        shares = np.bincount(chosen, minlength=3) / len(x)
        active.append(float(shares @ np.array(list(SIZES.values()))))
        assert active[-1] == pytest.approx(np.mean([SIZES[NAMES[i]] for i in chosen]))
    assert active == sorted(active)
    assert active[0] == 1.0


@pytest.mark.parametrize(("uncertainty", "always"), [(0.0, True), (None, False)])
def test_threshold_of_uncertainty(uncertainty, always):
    x, examples = categories(300)
    chosen = score(x, fit(x, examples, Params(general="middle", uncertainty=uncertainty))).argmax(axis=1)
    plain = score(x, fit(x, examples, Params())).argmax(axis=1)
    assert (set(chosen) == {1}) == always
    assert always or (chosen == plain).all()


def test_unclear_prompts_go_to_the_general_expert():
    x, examples = categories(300)
    state = fit(x, examples, Params(general="large", uncertainty=0.5))
    between = np.full((1, 3), 4 / 3, np.float32)
    assert score(between, state).argmax() == 2
    assert (score(x, state).argmax(axis=1) == score(x, fit(x, examples, Params())).argmax(axis=1)).all()


def test_an_expert_that_is_best_nowhere_changes_nothing():
    x, examples = categories(300)
    more = np.column_stack([examples.quality, np.zeros(300)])
    cost = np.column_stack([examples.cost, np.ones(300)])
    four = Examples((*NAMES, "useless"), examples.prompts, more, cost, examples.categories, False)
    chosen = score(x, fit(x, four, Params())).argmax(axis=1)
    assert (chosen == score(x, fit(x, examples, Params())).argmax(axis=1)).all()


def test_separable_prompts_are_all_right_and_shuffled_ones_at_chance():
    x, _ = categories(900)
    places = np.arange(900) % 3
    adapters = labelled(NAMES, [""] * 900, places)  # experts that are adapters: prompts were made for each
    assert (score(x, fit(x, adapters, Params())).argmax(axis=1) == places).all()
    shuffled = np.random.default_rng(0).permutation(places)
    state = fit(x[:600], labelled(NAMES, [""] * 600, shuffled[:600]), Params())
    assert abs((score(x[600:], state).argmax(axis=1) == shuffled[600:]).mean() - 1 / 3) < 0.1


@pytest.mark.parametrize("classifier", ["centroid", "naive_bayes", "classifier"])
def test_any_router_tells_the_categories_apart(classifier):
    x, examples = categories(300)
    chosen = score(x, fit(x, examples, Params(classifier=classifier))).argmax(axis=1)
    assert (chosen == score(x, fit(x, examples, Params())).argmax(axis=1)).mean() > 0.98
