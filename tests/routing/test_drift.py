"""Drift of scores against histograms made by hand, on prompts like those of the fit and on others."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from toolkit.data.rows import write_rows
from toolkit.errors import CheckpointError
from toolkit.routing import drift
from toolkit.routing.fit import fit_router
from toolkit.routing.router import kind_module, load_router


def scores(count=5000, seed=0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32) + np.float32(shift)


def by_hand(then, now):
    """The index of two samples, with numpy's own histogram over the deciles of the first."""
    edges = [-np.inf, *np.quantile(then, np.arange(1, 10) / 10), np.inf]
    a, b = (np.histogram(x, edges)[0] / len(x) for x in (now, then))
    return float(((a - b) * np.log(a / b)).sum())


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_index_is_that_of_the_definition(shift):
    then, now = scores(), scores(3000, seed=1, shift=shift)
    found = drift.index(now, drift.fit(then))
    best = [np.sort(x, axis=1) for x in (then, now)]
    assert found["score"] == pytest.approx(by_hand(best[0][:, -1], best[1][:, -1]), rel=1e-4)
    assert found["margin"] == pytest.approx(by_hand(*(x[:, -1] - x[:, -2] for x in best)), rel=1e-4)
    assert found["margin"] < 0.02, "all scores moved alike"
    assert (found["score"] > 0.25) == (shift == 1.0)
    assert found["score"] < 0.02 or shift


def test_bins_that_are_empty_now_or_were_then_are_finite():
    state = drift.fit(np.repeat(np.float32([[1.0, 0.0], [2.0, 0.0]]), 100, axis=0))
    assert np.isfinite(list(drift.index(scores(200)[:, :2], state).values())).all()
    assert drift.index(np.repeat(np.float32([[1.0, 0.0], [2.0, 0.0]]), 60, axis=0), state)["score"] < 1e-6


def test_few_prompts_and_single_experts():
    assert drift.fit(scores(99)) == {}
    assert drift.index(scores(99), drift.fit(scores())) == {}
    assert drift.index(scores(), {}) == {}
    alone = drift.index(scores()[:, :1], drift.fit(scores(seed=2)[:, :1]))
    assert alone["margin"] == 0
    assert alone["score"] < 0.02


def test_meter_looks_back_on_the_last_decisions():
    meter = drift.Meter(drift.fit(scores()))
    meter.observe(scores(99, seed=1))
    assert meter.index() == {}
    meter.observe(scores(drift.WINDOW, seed=2))
    assert meter.index() == drift.index(scores(drift.WINDOW, seed=2), meter.state)
    for batch in np.split(scores(drift.WINDOW, seed=3, shift=2), 50):
        meter.observe(batch)
    assert meter.index() == drift.index(scores(drift.WINDOW, seed=3, shift=2), meter.state)
    assert meter.index()["score"] > 1
    silent = drift.Meter({})
    silent.observe(scores())
    assert silent.index() == {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A router over two kinds of sums, its folder and prompts like its own."""
    folder = tmp_path_factory.mktemp("drift")
    rng = np.random.default_rng(0)
    texts = {
        "sums": [f"What is {a} plus {b}?" for a, b in rng.integers(1000, size=(700, 2))],
        "words": [f"Spell {''.join(rng.choice(list('abcdefgh'), 6))} backwards" for _ in range(700)],
    }
    for name, prompts in texts.items():
        write_rows(folder / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts[:500]])
    spec = {
        "router": "knn",
        "words": {"buckets": 512, "dimensions": 16},
        "experts": {name: str(folder / f"{name}.jsonl") for name in texts},
    }
    fit_router(spec, folder / "router", quiet=True)
    return folder, spec, [prompt for prompts in texts.values() for prompt in prompts[500:]]


def test_new_prompts_like_those_of_the_fit_show_no_drift_and_others_do(saved):
    folder, _, new = saved
    router = load_router(folder / "router")
    same = router.drift(new)
    other = router.drift([f"Translate sentence {i} into {'German' if i % 2 else 'French'}" for i in range(300)])
    assert max(same.values()) < 0.15 < 0.25 < max(other.values())
    # A router's own prompts are their own nearest neighbours: histograms of their scores would show drift at once.
    own = drift.fit(router.score([row for name in ("sums", "words") for row in _texts(folder / f"{name}.jsonl")]))
    assert max(drift.index(router.score(new), own).values()) > max(same.values())


def _texts(path):
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_histograms_are_saved_checked_and_left_out(saved, tmp_path):
    _, spec, new = saved
    router = fit_router(spec, tmp_path / "router", quiet=True)
    again = load_router(tmp_path / "router")
    assert again.drift(new) == router.drift(new)
    assert again.version == router.version
    without = fit_router(spec | {"folds": 0}, quiet=True)
    assert without.drift(new) == {}
    np.testing.assert_array_equal(without.score(new), router.score(new))
    assert router.add("more", ["x", "y"]).histograms == {}
    path = tmp_path / "router" / "router.safetensors"
    arrays = load_file(path)
    save_file(arrays | {"drift.edges": arrays["drift.edges"][:, :3].copy()}, path)
    with pytest.raises(CheckpointError, match=r"edges is \[2, 3\], expected \[2, 9\]"):
        load_router(tmp_path / "router")


def test_an_expert_of_one_prompt_leaves_no_histograms(saved, tmp_path):
    _, spec, _ = saved
    write_rows(tmp_path / "one.jsonl", [{"prompt": "Sing"}])
    experts = spec["experts"] | {"one": str(tmp_path / "one.jsonl")}
    alone = fit_router(spec | {"router": "centroid", "experts": experts}, quiet=True)
    assert alone.histograms == {}


def test_many_prompts_need_one_more_fit_alone(saved, monkeypatch):
    _, spec, _ = saved
    sizes = []
    module = kind_module("knn")
    fit = module.fit
    monkeypatch.setattr(module, "fit", lambda vectors, *rest: sizes.append(len(vectors)) or fit(vectors, *rest))
    fit_router(spec, quiet=True)
    assert sizes == [1000] + [800] * 5
    sizes.clear()
    monkeypatch.setattr(drift, "ENOUGH", 150)
    fit_router(spec, quiet=True)
    assert sizes == [1000, 800]


def test_prompts_are_embedded_once(saved):
    _, spec, new = saved
    asked = []

    def embed(texts):
        asked.extend(texts)
        noise = [np.random.default_rng(list(text.encode())).standard_normal(4) for text in texts]
        return (noise + np.array([[text.startswith("Spell")] for text in texts])).astype(np.float32)

    chosen = {"words": None, "embedding": {"model": "by hand"}}
    router = fit_router(spec | chosen, quiet=True, embedder=embed)
    assert len(asked) == 1000
    assert max(router.drift(new).values()) < 0.25
