"""Measured answers, from files to a fitted, judged, compared and calibrated router; all without a model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from toolkit.cli import main
from toolkit.data.rows import write_rows
from toolkit.errors import DataError, OutputError, SpecError, UnsupportedError
from toolkit.jobs.route import evaluate_router, explain_route, moved_decisions
from toolkit.routing.calibrate import calibrate_router
from toolkit.routing.compare import compare_routers, splits
from toolkit.routing.examples import read_outcomes
from toolkit.routing.fit import fit_router
from toolkit.routing.router import load_router
from toolkit.routing.spec import CompareSpec, OutcomesSpec

WIDE = {"scores": {"weak": "weak_correct", "strong": "strong_correct"}, "costs": {"weak": 0, "strong": 1}}


def rows_of(count=240, seed=0):
    """Sums, which the weak model gets wrong, and questions of capitals, which both get right."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        hard = i % 2 == 0
        prompt = (
            f"What is {rng.integers(100, 999)} times {rng.integers(100, 999)}?"
            if hard
            else f"Name the capital of {'ABCDEFG'[i % 7]}land."
        )
        weak = bool(rng.random() < (0.2 if hard else 0.9))
        rows.append(
            {
                "prompt": prompt,
                "subject": "sums" if hard else "capitals",
                "weak_correct": weak,
                "strong_correct": bool(rng.random() < 0.9),
            }
        )
    return rows


@pytest.fixture
def data(tmp_path) -> Path:
    write_rows(tmp_path / "data.jsonl", rows_of())
    write_rows(tmp_path / "test.jsonl", rows_of(seed=1))
    return tmp_path


def spec_of(data, file="data.jsonl", **changes):
    outcomes = {"data": str(data / file), "category": "subject", **WIDE}
    return {
        "router": "linear",
        "words": {"buckets": 256, "dimensions": 16},
        "form": 0.3,
        "outcomes": outcomes,
    } | changes


def test_long_and_wide_rows_are_the_same_answers(tmp_path):
    rows = rows_of(10)
    write_rows(tmp_path / "wide.jsonl", rows)
    long = [
        {"query_id": i, "query": row["prompt"], "model": name, "score": row[field], "cost": cost}
        for i, row in enumerate(rows)
        for name, field, cost in (("weak", "weak_correct", 0.25), ("strong", "strong_correct", 2.0))
    ]
    with (tmp_path / "long.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(long[0]))
        writer.writeheader()
        writer.writerows(long)
    costs = {"weak": 0.25, "strong": 2.0}
    wide = read_outcomes(OutcomesSpec(data=str(tmp_path / "wide.jsonl"), scores=WIDE["scores"], costs=costs))
    got = read_outcomes(OutcomesSpec(data=str(tmp_path / "long.csv")))
    assert got.experts == wide.experts == ("weak", "strong")
    assert got.prompts == wide.prompts == [row["prompt"] for row in rows]
    np.testing.assert_array_equal(got.quality, [[row["weak_correct"], row["strong_correct"]] for row in rows])
    np.testing.assert_array_equal(got.quality, wide.quality)
    np.testing.assert_array_equal(got.cost, wide.cost)


def test_missing_answers_and_ties(tmp_path):
    rows = [
        {"query_id": "p", "query": "one", "model": "dear", "score": 1, "cost": 5},
        {"query_id": "p", "query": "one", "model": "cheap", "score": 1, "cost": 1},
        {"query_id": "q", "query": "two", "model": "dear", "score": 0.5, "cost": 5},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    found = read_outcomes(OutcomesSpec(data=str(tmp_path / "rows.jsonl")))
    np.testing.assert_array_equal(found.quality, [[1, 1], [0.5, np.nan]])
    assert found.costs.tolist() == [5, 1]
    assert [found.experts[i] for i in found.labels] == ["cheap", "dear"]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"query": "x", "model": "a"}, {}, r"rows\.jsonl:1: no field 'query_id'"),
        ({"query_id": 1, "query": "x", "model": "a", "score": "good"}, {}, "score: expected a number, got 'good'"),
        ({"query_id": 1, "query": "x", "model": "a", "scor": 1}, {}, "no field 'score'; did you mean 'scor'"),
        ({"prompt": "x", "a_right": 1}, {"scores": {"a": "a_rigth"}}, "no field 'a_rigth'; did you mean 'a_right'"),
        ({"prompt": "x", "a": 1}, {"scores": {"a": "a"}, "category": "topic"}, "no field 'topic'"),
        ({"a": 1}, {"scores": {"a": "a"}}, "expected prompt and completion, messages, or text"),
    ],
)
def test_rows_that_cannot_be_used(row, options, message, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=message):
        read_outcomes(OutcomesSpec(data=str(tmp_path / "rows.jsonl"), **options))


def test_an_answer_is_scored_once(tmp_path):
    row = {"query_id": 1, "query": "x", "model": "a", "score": 1}
    write_rows(tmp_path / "rows.jsonl", [row, row])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: a second score of a for the query 1"):
        read_outcomes(OutcomesSpec(data=str(tmp_path / "rows.jsonl")))


def test_fitted_router_is_judged_beside_others(data):
    router = fit_router(spec_of(data), data / "router", quiet=True)
    spec = {"router": str(data / "router"), "outcomes": spec_of(data, "test.jsonl")["outcomes"], "plot": True}
    result = evaluate_router(spec, data / "out", quiet=True)
    numbers = result.numbers
    rows = rows_of(seed=1)
    weak, strong = (np.array([row[f"{name}_correct"] for row in rows], float) for name in ("weak", "strong"))
    scores = router.score([row["prompt"] for row in rows])
    taken = np.where(scores[:, 1] > scores[:, 0], strong, weak)
    assert numbers["quality"] == pytest.approx(taken.mean())
    assert numbers["regret"] == pytest.approx((np.maximum(weak, strong) - taken).mean())
    assert numbers["accuracy"] == pytest.approx(100 * (taken == np.maximum(weak, strong)).mean())
    assert numbers["shares"]["strong"] == numbers["cost"] == pytest.approx((scores[:, 1] > scores[:, 0]).mean())
    assert sum(numbers["confusion"]["strong"].values()) == (strong > weak).sum()
    assert numbers["brier"] == pytest.approx(np.square(scores - np.stack([weak, strong], 1)).mean(), rel=1e-5)
    beside = numbers["beside"]
    assert beside["random"]["apgr"] == 0.5
    assert beside["random"]["apgr"] < numbers["apgr"] < beside["oracle"]["apgr"]
    assert numbers["apgr"] > beside["prompt length"]["apgr"] - 0.1
    assert beside["best single"]["quality"] == strong.mean()
    assert beside["oracle"]["regret"] == 0
    assert beside["domain mean"]["apgr"] == pytest.approx(numbers["apgr"], abs=0.15)
    assert json.loads((data / "out" / "results.json").read_text())["apgr"] == numbers["apgr"]
    assert (data / "out" / "curve.png").stat().st_size > 5000
    assert [table.columns[0] for table in result.tables] == ["chosen by", "best", "strong, percent"]


def test_order_of_the_experts_in_the_answers_does_not_matter(data):
    router = fit_router(spec_of(data), quiet=True)
    outcomes = spec_of(data)["outcomes"]
    turned = outcomes | {"scores": dict(reversed(outcomes["scores"].items()))}
    given, other = (evaluate_router({"router": router, "outcomes": o}, quiet=True).numbers for o in (outcomes, turned))
    assert given == other


def test_prompts_that_go_to_the_fallback_are_counted_apart(data):
    router = fit_router(spec_of(data, policy={"minimum": 0.8}), quiet=True)
    numbers = evaluate_router({"router": router, "outcomes": spec_of(data)["outcomes"]}, quiet=True).numbers
    choices = router.choose([row["prompt"] for row in rows_of()])
    kept = [(row, c.expert) for row, c in zip(rows_of(), choices, strict=True) if c.expert != "base"]
    assert 0 < len(kept) < 240
    assert (numbers["prompts"], numbers["fallbacks"]) == (len(kept), 240 - len(kept))
    assert numbers["quality"] == pytest.approx(np.mean([row[f"{expert}_correct"] for row, expert in kept]))


def test_sparse_router_and_the_fallback_are_saved(data):
    write_rows(data / "sums.jsonl", [{"prompt": row["prompt"]} for row in rows_of()[::2]])
    write_rows(data / "capitals.jsonl", [{"prompt": row["prompt"]} for row in rows_of()[1::2]])
    experts = {name: str(data / f"{name}.jsonl") for name in ("sums", "capitals")}
    for words in ({"buckets": 256, "dimensions": None}, {"buckets": 256, "dimensions": 16}):
        spec = {"router": "linear", "words": words, "form": 0.2, "experts": experts, "scope": 0.02}
        router = fit_router(spec, data / "router", quiet=True, overwrite=True)
        again = load_router(data / "router")
        texts = ["What is 12 times 13?", "Name the capital of Bland.", "zu Dir, wütende Füchse überqueren!!!"]
        assert again.version == router.version
        assert again.choose(texts) == router.choose(texts)
        assert [choice.expert for choice in again.choose(texts)] == ["sums", "capitals", "base"]
        assert explain_route(again, texts[2]).numbers["reason"] == "out of scope"
        assert explain_route(again, texts[2]).numbers["novelty"] > again.policy.max_novelty
    numbers = evaluate_router({"router": again, "data": experts}, quiet=True).numbers
    assert numbers["accuracy"] > 95
    assert numbers["calibration_error"] < 0.2


def test_router_with_one_more_expert(data):
    texts = {"sums": [r["prompt"] for r in rows_of()[::2]], "capitals": [r["prompt"] for r in rows_of()[1::2]]}
    for name, prompts in texts.items():
        write_rows(data / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts])
    experts = {name: str(data / f"{name}.jsonl") for name in texts}
    words = {"buckets": 256, "dimensions": 16}
    router = fit_router({"router": "naive_bayes", "words": words, "experts": experts}, quiet=True)
    more = router.add("rhymes", [f"Find a rhyme for {word}ing, please" for word in ("s", "br", "cl", "str", "w", "r")])
    everything = [*texts["sums"], *texts["capitals"]]
    np.testing.assert_array_equal(more.score(everything)[:, :2], router.score(everything))
    assert more.choose(["Find a rhyme for kling, please"])[0].expert == "rhymes"
    assert moved_decisions(router, more, everything).numbers == {"prompts": 240, "moved": 0, "changes": []}
    moved = moved_decisions(router, more, ["Find a rhyme for kling, please"]).numbers
    assert moved["moved"] == 1
    assert moved["changes"][0]["to"] == "rhymes"
    judged = evaluate_router({"router": more, "before": router, "data": experts}, quiet=True)
    assert judged.numbers["moved"] == {"prompts": 240, "moved": 0, "changes": []}
    assert judged.tables[-1].title == "0 of 240 decisions moved"
    with pytest.raises(UnsupportedError, match="has an expert 'sums' already"):
        router.add("sums", ["x"])
    with pytest.raises(UnsupportedError, match="a linear router is fitted anew for a new expert"):
        fit_router({"router": "linear", "words": words, "experts": experts}, quiet=True).add("x", ["x"])


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_calibrated_share_is_kept(share, data):
    fit_router(spec_of(data), data / "router", quiet=True)
    before = load_router(data / "router")
    outcomes = spec_of(data)["outcomes"]
    result = calibrate_router({"router": str(data / "router"), "outcomes": outcomes, "share": {"strong": share}})
    after = load_router(data / "router")
    prompts = [row["prompt"] for row in rows_of()]
    choices = [choice.expert for choice in after.choose(prompts)]
    assert result.numbers["shares"]["strong"] == choices.count("strong") / 240
    assert share - 0.05 < choices.count("strong") / 240 <= share
    quality = [row[f"{choice}_correct"] for row, choice in zip(rows_of(), choices, strict=True)]
    assert result.numbers["quality"] == pytest.approx(np.mean(quality))
    assert after.version != before.version
    np.testing.assert_array_equal(after.score(prompts), before.score(prompts))


def test_calibrated_cost_by_prompts_alone(data):
    fit_router(spec_of(data), data / "router", quiet=True)
    spec = {"router": str(data / "router"), "prompts": str(data / "data.jsonl"), "cost": 2.0}
    with pytest.raises(SpecError, match="costs: a cost per request needs the cost of every expert"):
        calibrate_router(spec)
    numbers = calibrate_router(spec | {"costs": {"weak": 1.5, "strong": 4.0}}, data / "other").numbers
    assert 1.5 <= numbers["cost"] <= 2.0
    assert load_router(data / "router").policy.price == 0
    assert load_router(data / "other").policy.costs == {"weak": 1.5, "strong": 4.0}
    with pytest.raises(SpecError, match=r"costs\.strog: not an expert; did you mean 'strong'"):
        calibrate_router(spec | {"costs": {"strog": 1}})
    with pytest.raises(SpecError, match=r"cost: a budget of 1 per request, but the cheapest expert costs 1\.5"):
        calibrate_router(spec | {"costs": {"weak": 1.5, "strong": 4.0}, "cost": 1})
    with pytest.raises(OutputError, match="exists already"):
        calibrate_router(spec | {"costs": {"weak": 1.5, "strong": 4.0}}, data / "other")


def test_calibrated_scope_is_that_of_the_prompts_given(data):
    """Reworded prompts are farther from the fit's than these are from each other; the scope follows them."""
    texts = {"sums": [r["prompt"] for r in rows_of()[::2]], "capitals": [r["prompt"] for r in rows_of()[1::2]]}
    for name, prompts in texts.items():
        write_rows(data / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts])
    spec = {"words": {"buckets": 256, "dimensions": 16}, "experts": {n: str(data / f"{n}.jsonl") for n in texts}}
    fit_router(spec | {"scope": 0.01}, data / "router", quiet=True)
    asked = [f"Could you please tell me, {prompt.lower()}" for prompts in texts.values() for prompt in prompts]
    write_rows(data / "asked.jsonl", [{"prompt": prompt} for prompt in asked])
    before = load_router(data / "router")
    assert sum(choice.reason == "out of scope" for choice in before.choose(asked)) > 0.2 * len(asked)
    found = {"router": str(data / "router"), "prompts": str(data / "asked.jsonl"), "scope": 0.05}
    numbers = calibrate_router(found).numbers
    after = load_router(data / "router")
    out = sum(choice.reason == "out of scope" for choice in after.choose(asked)) / len(asked)
    assert numbers["out_of_scope"] == out <= 0.05
    vectors, known = after.features(asked), after.features([p for prompts in texts.values() for p in prompts])
    lengths = np.outer(np.linalg.norm(vectors, axis=1), np.linalg.norm(known, axis=1))
    nearest = 1 - (vectors @ known.T / lengths).max(axis=1)
    assert (nearest >= numbers["max_novelty"] - 1e-6).mean() >= 0.05, "no nearer bound would do"
    np.testing.assert_array_equal(after.score(asked), before.score(asked))
    with pytest.raises(SpecError, match="give one of share"):
        calibrate_router(found | {"cost": 1.0})
    with pytest.raises(SpecError, match="scope: the router keeps no prompts to compare with; fit it with"):
        calibrate_router(found | {"router": fit_router(spec, quiet=True)})


def compare_spec(data, **changes):
    routers = {name: {"router": name, "features": "words"} for name in ("linear", "knn")}
    features = {"words": {"words": {"buckets": 256, "dimensions": 8}}}
    return {"outcomes": spec_of(data)["outcomes"], "features": features, "routers": routers, "seeds": [0, 1]} | changes


def test_comparison_fits_on_one_part_and_judges_on_the_other(data):
    result = compare_routers(compare_spec(data), data / "out", quiet=True)
    found = result.numbers["routers"]
    assert list(found) == ["random", "prompt length", "best single", "domain mean", "oracle", "linear", "knn"]
    order = np.random.default_rng(1).permutation(240)
    rows = rows_of()
    write_rows(data / "train.jsonl", [rows[i] for i in order[:168]])
    write_rows(data / "rest.jsonl", [rows[i] for i in order[168:]])
    spec = spec_of(data, "train.jsonl", words={"buckets": 256, "dimensions": 8}, form=0)
    router = fit_router(spec, quiet=True)
    alone = evaluate_router({"router": router, "outcomes": spec_of(data, "rest.jsonl")["outcomes"]}, quiet=True).numbers
    for name in ("apgr", "cpt50", "quality", "regret"):
        assert found["linear"][1][name] == pytest.approx(alone[name])
        assert found["domain mean"][1][name] == pytest.approx(alone["beside"]["domain mean"][name])
    row = next(row for row in result.tables[0].to_dicts() if row["chosen by"] == "linear")
    assert row["apgr"] == pytest.approx(np.mean([one["apgr"] for one in found["linear"]]))
    assert "| linear |" in (data / "out" / "results.md").read_text()


def test_held_out_categories_are_never_fitted_on(data):
    rows = [row | {"subject": f"s{i % 10}"} for i, row in enumerate(rows_of())]
    write_rows(data / "many.jsonl", rows)
    outcomes = spec_of(data, "many.jsonl")["outcomes"]
    spec = CompareSpec.model_validate(compare_spec(data, outcomes=outcomes, split="categories"))
    seen = []
    for train, test in splits(read_outcomes(spec.outcomes), spec):
        assert not set(train.categories) & set(test.categories)
        assert (len(set(train.categories)), len(train) + len(test)) == (7, 240)
        seen.append(frozenset(test.categories))
    assert len(set(seen)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routers": {"x": {"router": "lineal", "features": "words"}}}, r"routers\.x\.router: unknown router 'lineal'"),
        ({"routers": {"x": {"router": "knn", "features": "wrods"}}}, r"routers\.x\.features: no features 'wrods'"),
        (
            {"routers": {"x": {"router": "knn", "features": "words", "parameters": {"k": 1}}}},
            r"routers\.x\.parameters\.k: unknown key 'k'",
        ),
        ({"train": 0.001}, "train: 0.001 of 240 rows leaves one part empty"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
    ],
)
def test_bad_comparisons(change, message, data):
    with pytest.raises(SpecError, match=message):
        compare_routers(compare_spec(data, **change), quiet=True)


def test_outcomes_of_other_experts_than_the_routers(data):
    router = fit_router(spec_of(data), quiet=True)
    outcomes = spec_of(data)["outcomes"] | {"scores": {"a": "weak_correct", "b": "strong_correct"}, "costs": {}}
    with pytest.raises(SpecError, match="outcomes: of a, b; the router chooses among weak, strong"):
        evaluate_router({"router": router, "outcomes": outcomes}, quiet=True)


def test_commands(data, capsys):
    for name, spec in (
        ("fit", spec_of(data, out=str(data / "router"))),
        ("evaluate", {"router": str(data / "router"), "outcomes": spec_of(data)["outcomes"]}),
        (
            "calibrate",
            {"router": str(data / "router"), "outcomes": spec_of(data)["outcomes"], "share": {"strong": 0.5}},
        ),
        ("compare", compare_spec(data)),
    ):
        (data / f"{name}.yaml").write_text(json.dumps(spec))
        assert main(["route", name, str(data / f"{name}.yaml"), "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert main(["route", "explain", str(data / "router"), "What is 3 times 4?", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"expert", "scores", "weights", "reason", "version"} <= shown.keys()
