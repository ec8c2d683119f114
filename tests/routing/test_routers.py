"""Every kind of router against scikit-learn, closed forms or brute force, on vectors made by hand."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsRegressor

from toolkit import names
from toolkit.errors import CheckpointError, DataError, SpecError
from toolkit.routing.examples import Examples, labelled
from toolkit.routing.fit import fit_state
from toolkit.routing.ops import products
from toolkit.routing.router import ROUTERS, kind_module
from toolkit.routing.routers import (
    centroid,
    classifier,
    cluster,
    ensemble,
    knn,
    linear,
    lora_retriever,
    matrix_factorization,
    naive_bayes,
)

KINDS = names.available(ROUTERS)
ADDING = [kind for kind in KINDS if hasattr(kind_module(kind), "add")]


def blobs(num_experts=4, each=12, width=6, spread=1.0, seed=0):
    """Prompts of experts around a point of their own, in an oblique space."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(num_experts), each)
    x = rng.standard_normal((len(owner), width)) @ rng.standard_normal((width, width)) * spread
    x += 3 * rng.standard_normal((num_experts, width))[owner]
    return x.astype(np.float32), labelled([f"e{i}" for i in range(num_experts)], [""] * len(owner), owner)


def outcomes(count=300, width=5, seed=0, unknown=False):
    """Measured answers of three experts, whose quality is linear in the vectors but for noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, width)).astype(np.float32)
    quality = x @ rng.standard_normal((width, 3)) + [0.0, 0.3, -0.2] + rng.standard_normal((count, 3))
    if unknown:
        quality[rng.random(count) < 0.3, 1] = np.nan
    cost = np.tile([1.0, 2.0, 3.0], (count, 1))
    return x, Examples(("a", "b", "c"), [""] * count, quality, cost, ["x", "y"] * (count // 2), False)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0, None])
def test_centroid_is_the_mahalanobis_distance(shrinkage):
    x, examples = blobs()
    labels = examples.labels
    state = centroid.fit(x + 5, examples, centroid.Params(shrinkage=shrinkage))
    means = [(x + 5)[labels == i].astype(np.float64).mean(0) for i in range(4)]
    within = np.stack([(x + 5)[i] - means[labels[i]] for i in range(len(x))])
    if shrinkage is None:
        covariance, share = ledoit_wolf(within, assume_centered=True)
        assert 0 < share < 1
    else:
        covariance = within.T @ within / len(x)
        covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / 6 * np.eye(6)
    new = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32) + 5
    got = centroid.score(new, state)
    for i in range(7):
        for j in range(4):
            d = new[i] - means[j]
            assert got[i, j] == pytest.approx(-d @ np.linalg.inv(covariance) @ d / 2, rel=1e-3, abs=1e-3)


def test_a_single_expert_is_always_chosen():
    state = centroid.fit(np.ones((3, 4), np.float32), labelled(["a"], [""] * 3, np.zeros(3, int)), centroid.Params())
    assert np.isfinite(centroid.score(np.zeros((2, 4), np.float32), state)).all()


@pytest.mark.system("naive_bayes_router")
@pytest.mark.parametrize("prior", ["uniform", "counts"])
def test_naive_bayes_is_scikit_learns(prior):
    x, examples = blobs()
    x, examples = x[:-5], examples.take(np.arange(len(x) - 5))
    state = naive_bayes.fit(x, examples, naive_bayes.Params(smoothing=0, prior=prior))
    priors = [0.25] * 4 if prior == "uniform" else None
    theirs = GaussianNB(var_smoothing=0, priors=priors).fit(x.astype(float), examples.labels)
    ours = naive_bayes.score(x, state)
    expected = theirs.predict_joint_log_proba(x.astype(float))
    np.testing.assert_allclose(ours - ours[:, :1], expected - expected[:, :1], rtol=1e-3, atol=1e-3)


@pytest.mark.system("naive_bayes_router")
def test_naive_bayes_in_parts_is_that_of_all_at_once():
    x, examples = blobs(each=20)
    params = naive_bayes.Params()
    whole = naive_bayes.fit(x, examples, params)
    first = np.flatnonzero(np.arange(len(x)) % 20 < 7)
    parts = naive_bayes.fit(x[first], examples.take(first), params)
    for expert in range(4):
        for rows in np.array_split(np.arange(7, 20) + 20 * expert, 3):
            parts = naive_bayes.observe(parts, expert, x[rows])
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, atol=1e-4)
    gone = naive_bayes.remove(naive_bayes.add(whole, x[:5] + 1), 4)
    assert all((gone[name] == value).all() for name, value in whole.items())
    without = naive_bayes.remove(whole, 1)
    np.testing.assert_array_equal(naive_bayes.score(x, without), naive_bayes.score(x, whole)[:, [0, 2, 3]])


@pytest.mark.system("naive_bayes_router")
def test_naive_bayes_with_shared_variances_is_linear_and_equal_classes_are_equal():
    x, examples = blobs()
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 50, 6)).astype(np.float32)
    bent = {}
    for variances in ("own", "shared"):
        state = naive_bayes.fit(x, examples, naive_bayes.Params(variances=variances))
        gaps = [s[:, 1] - s[:, 0] for s in (naive_bayes.score(v, state) for v in (a, b, (a + b) / 2))]
        bent[variances] = np.abs((gaps[0] + gaps[1]) / 2 - gaps[2]).max()
    assert bent["shared"] < 1e-3 < 0.1 < bent["own"]
    twice = labelled(["e", "f"], [""] * 24, np.repeat([0, 1], 12))
    same = naive_bayes.score(a, naive_bayes.fit(np.tile(x[:12], (2, 1)), twice, naive_bayes.Params()))
    np.testing.assert_array_equal(same[:, 0], same[:, 1])


@pytest.mark.system("naive_bayes_router")
def test_naive_bayes_needs_fewer_examples_than_logistic_regression():
    """Independent numbers of many, four examples per expert: the generative model wins; with many, it is no better."""
    gains = {}
    for each in (4, 400):
        found = []
        for seed in range(8):
            rng = np.random.default_rng(seed)
            means, scales = 0.35 * rng.standard_normal((5, 64)), np.exp(0.5 * rng.standard_normal(64))
            owner = np.repeat(np.arange(5), each)
            test = np.repeat(np.arange(5), 100)
            draw = lambda who, rng=rng, m=means, s=scales: (m[who] + rng.standard_normal((len(who), 64))) * s  # noqa: E731
            x, y = draw(owner).astype(np.float32), draw(test).astype(np.float32)
            state = naive_bayes.fit(
                x, labelled(list("abcde"), [""] * len(x), owner), naive_bayes.Params(variances="shared")
            )
            ours = (naive_bayes.score(y, state).argmax(1) == test).mean()
            theirs = LogisticRegression(max_iter=1000).fit(x, owner).score(y, test)
            found.append(ours - theirs)
        gains[each] = float(np.mean(found))
    assert gains[4] > 0.05
    assert abs(gains[400]) < gains[4] / 2


def test_knn_on_measured_answers_is_scikit_learns():
    x, examples = outcomes(unknown=True)
    new = np.random.default_rng(5).standard_normal((40, 5)).astype(np.float32)
    got = knn.score(new, knn.fit(x, examples, knn.Params(neighbors=7)))
    unit = new / np.linalg.norm(new, axis=1, keepdims=True)
    for expert in range(3):
        known = np.isfinite(examples.quality[:, expert])
        theirs = KNeighborsRegressor(7, metric="cosine").fit(x[known], examples.quality[known, expert])
        np.testing.assert_allclose(got[:, expert], theirs.predict(unit), rtol=1e-5, atol=1e-5)


def test_knn_of_labelled_prompts_is_brute_force():
    x, examples = blobs(each=9)
    x, examples = x[:-6], examples.take(np.arange(len(x) - 6))  # the last expert has fewer prompts than neighbours
    got = knn.score(x + 1, knn.fit(x, examples, knn.Params(neighbors=4)))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x + 1, x)]
    for expert in range(4):
        near = np.sort(unit[0] @ unit[1][examples.labels == expert].T, axis=1)[:, -4:]
        np.testing.assert_allclose(got[:, expert], near.mean(axis=1), rtol=1e-5, atol=1e-6)


def test_knn_chooses_the_number_of_neighbours_that_predicts_best():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 2)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for noise, wanted in ((3.0, {100, 50}), (0.0, {10})):
        quality = x[:, :1] + noise * rng.standard_normal((400, 1))
        examples = Examples(("a",), [""] * 400, quality, np.full((400, 1), np.nan), [""] * 400, False)
        assert int(knn.fit(x, examples, knn.Params())["neighbors"][0]) in wanted


@pytest.mark.parametrize("count", [10, 12, 14, 30])
def test_ridge_is_scikit_learns_and_leaves_one_out(count):
    x, examples = outcomes(count=count)
    given = linear.fit(x, examples, linear.Params(penalty=0.2))
    theirs = Ridge(alpha=0.2 * count).fit(x.astype(float), examples.quality)
    np.testing.assert_allclose(linear.score(x, given), theirs.predict(x), rtol=1e-4, atol=1e-4)
    chosen = linear.fit(x, examples, linear.Params())
    theirs = RidgeCV(alphas=linear.PENALTIES * count, cv=count, scoring="neg_mean_squared_error")
    theirs = theirs.fit(x.astype(float), examples.quality)
    np.testing.assert_allclose(linear.score(x, chosen), theirs.predict(x), rtol=1e-4, atol=1e-4)


def test_ridge_of_an_expert_that_was_not_always_asked():
    x, examples = outcomes(unknown=True)
    got = linear.score(x, linear.fit(x, examples, linear.Params(penalty=0.01)))
    for expert in range(3):
        known = np.isfinite(examples.quality[:, expert])
        theirs = Ridge(alpha=0.01 * known.sum()).fit(x[known].astype(float), examples.quality[known, expert])
        np.testing.assert_allclose(got[:, expert], theirs.predict(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_logistic_regression_is_scikit_learns(form):
    x, examples = blobs(each=30)
    state = linear.fit(form(x), examples, linear.Params(penalty=0.01, steps=2000))
    theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-10, max_iter=5000).fit(x, examples.labels)
    np.testing.assert_allclose(linear.score(form(x), state), theirs.predict_log_proba(x), rtol=1e-2, atol=1e-2)


def test_clusters_are_scikit_learns():
    x, examples = outcomes(count=200)
    params = cluster.Params(clusters=6, nearest=1, smoothing=2)
    state = cluster.fit(x, examples, params)
    first = x[np.sort(np.random.default_rng(0).permutation(200)[:6])].astype(float)
    theirs = KMeans(6, init=first, n_init=1, max_iter=30, tol=0, algorithm="lloyd").fit(x.astype(float))
    np.testing.assert_allclose(state["centers"], theirs.cluster_centers_, rtol=1e-4, atol=1e-5)
    overall = examples.quality.mean(axis=0)
    own = [examples.quality[theirs.labels_ == c] for c in range(6)]
    expected = np.array([(q.sum(axis=0) + 2 * overall) / (len(q) + 2) for q in own])
    np.testing.assert_allclose(cluster.score(x, state), expected[theirs.predict(x.astype(float))], rtol=1e-4)
    three = cluster.score(x, state | {"nearest": np.array([6], np.float32)})
    np.testing.assert_allclose(three, np.tile(expected.mean(axis=0), (200, 1)), rtol=1e-4)


def test_matrix_factorization_without_prompts_learns_how_often_each_expert_wins():
    """Vectors of zeros leave one number per expert, whose differences are the logits of the shares of wins."""
    rng = np.random.default_rng(0)
    quality = np.stack([rng.random(3000) < 0.5, rng.random(3000) < 0.8], axis=1).astype(float)
    examples = Examples(("a", "b"), [""] * 3000, quality, np.full((3000, 2), np.nan), [""] * 3000, False)
    params = matrix_factorization.Params(weight_decay=0, ties=0, rank=4, learning_rate=0.01, epochs=40)
    scores = matrix_factorization.score(
        np.zeros((1, 3), np.float32), matrix_factorization.fit(np.zeros((3000, 3), np.float32), examples, params)
    )
    wins = (quality[:, 1] > quality[:, 0]).sum() / (quality[:, 1] != quality[:, 0]).sum()
    assert scores[0, 1] - scores[0, 0] == pytest.approx(np.log(wins / (1 - wins)), abs=0.15)


def test_matrix_factorization_learns_where_each_expert_is_better():
    x, examples = outcomes(count=1200)
    rows = np.arange(1000)
    state = matrix_factorization.fit(x[:1000], examples.take(rows), matrix_factorization.Params(rank=8))
    gap = matrix_factorization.score(x[1000:], state)
    better = examples.quality[1000:, 0] > examples.quality[1000:, 1]
    straight = linear.score(x[1000:], linear.fit(x[:1000], examples.take(rows), linear.Params()))
    told = ((straight[:, 0] > straight[:, 1]) == better).mean()
    assert ((gap[:, 0] > gap[:, 1]) == better).mean() > told - 0.03 > 0.65
    shuffled = Examples(
        ("a", "b", "c"), [""] * 1000, examples.quality[:1000][::-1], examples.cost[:1000], [""] * 1000, False
    )
    gap = matrix_factorization.score(
        x[1000:], matrix_factorization.fit(x[:1000], shuffled, matrix_factorization.Params(rank=8))
    )
    assert ((gap[:, 0] > gap[:, 1]) == better).mean() < 0.6


def test_classifier_computes_what_torch_computes_and_learns():
    x, examples = outcomes(count=600)
    params = classifier.Params(hidden=16, networks=2, epochs=40, batch_size=32, dropout=0)
    state = classifier.fit(x, examples, params)
    scale, low, spread, _ = map(float, state["settings"])
    expected = torch.zeros(600, 3)
    for i in range(2):
        first, second = (torch.from_numpy(state[name][i]) for name in ("first", "second"))
        hidden = torch.relu(torch.from_numpy(x) * scale @ first + torch.from_numpy(state["first_bias"][i]))
        expected += torch.sigmoid(hidden @ second + torch.from_numpy(state["second_bias"][i])) / 2
    got = classifier.score(x, state)
    np.testing.assert_allclose(got, low + spread * expected.numpy(), rtol=1e-4, atol=1e-5)
    best = np.square(linear.score(x, linear.fit(x, examples, linear.Params())) - examples.quality).mean()
    assert np.square(got - examples.quality).mean() < 1.2 * best < 0.5 * examples.quality.var()
    again = classifier.fit(x, examples, params)
    assert all((again[name] == value).all() for name, value in state.items())


def test_retriever_is_the_cosine_with_the_mean():
    x, examples = blobs(each=5)
    got = lora_retriever.score(x, lora_retriever.fit(x, examples, lora_retriever.Params(samples=5)))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for expert in range(4):
        mean = unit[examples.labels == expert].mean(axis=0)
        np.testing.assert_allclose(got[:, expert], unit @ mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-5)


def test_ensemble_is_the_weighted_mean():
    x, examples = outcomes()
    params = ensemble.Params(
        members={"knn": ensemble.Member(weight=3, parameters={"neighbors": 5}), "linear": ensemble.Member()}
    )
    got = ensemble.score(x, ensemble.fit(x, examples, params))
    near = knn.score(x, knn.fit(x, examples, knn.Params(neighbors=5)))
    straight = linear.score(x, linear.fit(x, examples, linear.Params()))
    np.testing.assert_allclose(got, 0.75 * near + 0.25 * straight, rtol=1e-4, atol=1e-5)
    with pytest.raises(SpecError, match=r"parameters\.members\.knn\.parameters\.neighbours: unknown key"):
        ensemble.fit(x, examples, ensemble.Params(members={"knn": ensemble.Member(parameters={"neighbours": 5})}))


@pytest.mark.parametrize("count", [3, 255, 256, 300])
@pytest.mark.parametrize("kind", ADDING)
def test_a_new_expert_changes_no_bit_of_the_others_scores(kind, count):
    module = kind_module(kind)
    x, examples = blobs(num_experts=count, each=3, width=20)
    state = module.fit(x, examples, module.Params())
    rng = np.random.default_rng(1)
    prompts = rng.standard_normal((9, 20)).astype(np.float32)
    for size in (1, 9):
        before = module.score(prompts[:size], state)
        more = state
        for _ in range(3):
            more = module.add(more, rng.standard_normal((30, 20)).astype(np.float32))
        module.check(more, count + 3)
        np.testing.assert_array_equal(module.score(prompts[:size], more)[:, :count], before)


def test_experts_are_added_by_the_routers_that_promise_it():
    assert {"centroid", "knn", "naive_bayes"} <= set(ADDING)


@pytest.mark.parametrize("kind", ADDING)
def test_an_expert_that_is_added_twice_has_equal_scores(kind):
    module = kind_module(kind)
    x, examples = blobs(each=15)
    state = module.fit(x + 2, examples, module.Params())
    scores = module.score(x + 2.5, module.add(state, (x + 2)[examples.labels == 1]))
    np.testing.assert_allclose(scores[:, 4], scores[:, 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ADDING)
def test_an_added_expert_is_found(kind):
    module = kind_module(kind)
    x, examples = blobs(each=30, spread=0.3)
    three = examples.labels < 3
    smaller = labelled(["e0", "e1", "e2"], [""] * 90, examples.labels[three])
    state = module.add(module.fit(x[three], smaller, module.Params()), x[~three])
    assert (module.score(x, state).argmax(axis=1) == examples.labels).mean() > 0.95


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 600])
def test_products_are_products(count):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3, 7)), rng.standard_normal((count, 7))
    np.testing.assert_allclose(products(x, y), x @ y.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ADDING)
def test_a_thousand_experts_take_less_than_five_milliseconds(kind):
    module = kind_module(kind)
    x, examples = blobs(num_experts=1000, each=5, width=128)
    state = module.fit(x, examples, module.Params())
    times = []
    for _ in range(30):
        start = time.perf_counter()
        module.score(x[:1], state)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measured", [False, True])
def test_every_kind_tells_apart_what_can_be_and_checks_its_arrays(kind, measured):
    x, examples = blobs(each=40, spread=0.3)
    if measured:
        cost = np.tile(np.arange(4.0), (160, 1))
        examples = Examples(examples.experts, examples.prompts, examples.quality, cost, examples.categories, False)
    module = kind_module(kind)
    state = fit_state(module, module.Params(), x, examples)
    scores = module.score(x, state)
    assert scores.shape == (160, 4)
    assert scores.dtype == np.float32
    assert (scores.argmax(axis=1) == examples.labels).mean() > 0.95
    module.check(state, 4)
    with pytest.raises(CheckpointError):
        module.check(state, 5)
    with pytest.raises(CheckpointError, match="the router was fitted on 6; fit it anew"):
        module.score(x[:, :5], state)
    for name in state:
        with pytest.raises(CheckpointError):
            module.check({key: value for key, value in state.items() if key != name}, 4)


@pytest.mark.parametrize("kind", ["centroid", "naive_bayes", "lora_retriever"])
def test_an_expert_that_is_best_nowhere_cannot_be_learned_from_labels(kind):
    x, examples = outcomes()
    quality = examples.quality.copy()
    quality[:, 2] = quality.min() - 1
    worst = Examples(examples.experts, examples.prompts, quality, examples.cost, examples.categories, False)
    with pytest.raises(DataError, match="c is the best expert on no row"):
        kind_module(kind).fit(x, worst, kind_module(kind).Params())


def test_sparse_vectors_are_refused_where_they_cannot_be_used():
    x, examples = blobs()
    with pytest.raises(SpecError, match=r"words\.dimensions: centroid takes no sparse vectors"):
        fit_state(centroid, centroid.Params(), sparse.csr_array(x), examples)
    x, examples = outcomes()
    with pytest.raises(SpecError, match=r"words\.dimensions: linear on measured answers"):
        linear.fit(sparse.csr_array(x), examples, linear.Params())
