"""Searches of coefficients: planted optima, brute force, and the scores of what `best.yaml` merges."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.optimize import lsq_linear

import toolkit
from tests import tiny
from toolkit import specs
from toolkit.cli import main
from toolkit.data.rows import write_rows
from toolkit.errors import DataError, MissingError, OutputError, SpecError
from toolkit.jobs.evaluate import evaluate
from toolkit.jobs.recipe import run_recipe
from toolkit.jobs.search.judge import Judge
from toolkit.jobs.search.methods import Evaluation, best_of, budget_of, propose, run
from toolkit.jobs.search.run import search
from toolkit.jobs.search.space import Space, make_space
from toolkit.jobs.search.spec import OptionsSpec, SearchSpec
from toolkit.models.load import load_tokenizer

RECIPES = Path(__file__).parent.parent.parent / "recipes"
PLANTED = (0.75, 0.5)
"""Weights of the merge whose answers the tasks ask for."""

ROWS = 6


TILT = np.random.default_rng(5).normal(size=(3, 3)) + 2 * np.eye(3)


def quadratic_space(options: OptionsSpec, starts=(0.5, 0.5, 0.5)) -> Space:
    models = [{"model": str(i), "parameters": {"weight": start}} for i, start in enumerate(starts)]
    space, problems = make_space({"merge_method": "task_arithmetic", "models": models}, options)
    assert not problems
    return space


def searched(options: OptionsSpec, optimum, starts=(0.5, 0.5, 0.5)) -> list[Evaluation]:
    """Search the top of a tilted, badly scaled paraboloid."""
    space = quadratic_space(options, starts)

    def measure(values):
        return Evaluation(values, -float(np.sum((TILT @ (np.array(values) - optimum)) ** 2)), {})

    budget, problems = budget_of(options, space)
    assert not problems
    return run(space.start, propose(options, space), budget, measure)


def test_cma_finds_a_planted_optimum():
    optimum = (0.31, 1.12, 0.74)
    done = searched(OptionsSpec(budget=400, seed=3), optimum)
    assert best_of(done).values == pytest.approx(optimum, abs=2e-3)
    assert done[0].values == (0.5, 0.5, 0.5)
    assert best_of(done[:20]).score < -1e-2, "it is not found by chance"


@pytest.mark.parametrize("method", ["cma", "random"])
def test_candidates_stay_within_their_bounds_and_depend_on_the_seed_alone(method):
    parameters = [
        {"path": "models[0].parameters.weight", "low": 0.4, "high": 0.6},
        {"path": "models[1].parameters.weight", "low": -1, "high": 0.5},
        {"path": "models[2].parameters.weight", "low": 1e-3, "high": 10, "log": True},
    ]
    optimum = np.array([2.0, 3.0, 0.01])
    runs = [
        searched(OptionsSpec(method=method, budget=300, seed=seed, parameters=parameters), optimum)
        for seed in (1, 1, 2)
    ]
    values = [np.array([e.values for e in done]) for done in runs]
    assert np.array_equal(values[0], values[1])
    assert not np.array_equal(values[0][1:], values[2][1:])
    for found in values:
        assert ((found >= [0.4, -1, 1e-3]) & (found <= [0.6, 0.5, 10])).all()
        assert len(np.unique(found, axis=0)) > 100
    if method == "random":
        shares = np.log(values[0][1:, 2] / 1e-3) / np.log(1e4)
        assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
        assert np.quantile(shares, [0.25, 0.75]) == pytest.approx([0.25, 0.75], abs=0.12)
    else:
        within = lsq_linear(TILT, TILT @ optimum, ([0.4, -1, 1e-3], [0.6, 0.5, 10]), tol=1e-14).x
        assert best_of(runs[0]).values == pytest.approx(within, abs=2e-3), "the optimum is outside"


def test_grid_is_every_combination():
    parameters = [
        {"path": "models[0].parameters.weight", "low": 0, "high": 1, "points": 3},
        {"path": "models[1].parameters.weight", "low": 0.01, "high": 1, "log": True, "points": 3},
        {"path": "models[2].parameters.weight", "low": 0.2, "high": 0.8, "points": 4},
    ]
    optimum = (0.7, 0.3, 0.5)
    done = searched(OptionsSpec(method="grid", parameters=parameters), optimum)
    points = list(itertools.product([0, 0.5, 1], [0.01, 0.1, 1], [0.2, 0.4, 0.6, 0.8]))
    assert [e.values for e in done[1:]] == [pytest.approx(point, rel=1e-12) for point in points]
    brute = min([(0.5, 0.5, 0.5), *points], key=lambda p: np.sum((TILT @ (np.array(p) - optimum)) ** 2))
    assert best_of(done).values == pytest.approx(brute, rel=1e-12)


def test_best_of_equals_is_the_first():
    done = [Evaluation((float(i),), score, {}) for i, score in enumerate((1.0, 3.0, 3.0, 2.0))]
    assert best_of(done).values == (1.0,)


def test_one_free_number_and_values_that_come_back():
    merge = {"merge_method": "slerp", "parameters": {"t": 0.5}}
    options = OptionsSpec(parameters=[{"path": "parameters.t", "low": 0, "high": 1}], budget=60)
    space, _ = make_space(merge, options)
    asked = []

    def measure(values):
        asked.append(values)
        return Evaluation(values, -((values[0] - 0.2) ** 2), {})

    done = run(space.start, propose(options, space), 200, measure)
    assert best_of(done).values[0] == pytest.approx(0.2, abs=1e-3)
    assert len(set(asked)) == len(asked) < len(done) <= 200


def test_numbers_are_addressed_by_their_key_path():
    merge = {
        "merge_method": "ties",
        "base_model": "b",
        "models": [
            {"model": "x", "parameters": {"weight": [0.1, {"filter": "mlp", "value": [0.2, 0.3]}], "density": 0.5}},
            {"model": "y", "parameters": {"weight": 0.4, "density": 0.6}},
        ],
        "parameters": {"lambda": 1, "normalize": True},
        "slices": [{"sources": [{"layer_range": [0, 2], "parameters": {"weight": 0.9}}]}],
    }
    before = json.dumps(merge)

    def paths(*asked):
        space, problems = make_space(merge, OptionsSpec(parameters=[{"path": p, "high": 2} for p in asked]))
        assert not problems
        return space, [free.path for free in space.free]

    weights = ["weight[0]", "weight[1].value[0]", "weight[1].value[1]"]
    assert paths("models[0].parameters.weight")[1] == [f"models[0].parameters.{w}" for w in weights]
    assert paths("models[0].parameters.weight[1].value[1]")[1] == ["models[0].parameters.weight[1].value[1]"]
    assert paths("models[*].parameters.density")[1] == [f"models[{i}].parameters.density" for i in (0, 1)]
    assert paths("slices")[1] == ["slices[0].sources[0].parameters.weight"], "no layer range is a coefficient"
    assert len(paths("models")[1]) == 6
    space, _ = paths("parameters.lambda", "models[0].parameters.weight[1]", "models[1].parameters.weight")
    assert space.start == (1, 0.2, 0.3, 0.4)
    wanted = json.loads(before)
    wanted["parameters"]["lambda"] = 1.5
    wanted["models"][0]["parameters"]["weight"][1]["value"] = [0.6, 0.7]
    wanted["models"][1]["parameters"]["weight"] = 0.8
    assert space.spec((1.5, 0.6, 0.7, 0.8)) == wanted
    assert json.dumps(merge) == before
    default, _ = make_space(merge, OptionsSpec())
    assert [free.path for free in default.free] == [f"models[0].parameters.{w}" for w in weights] + [
        "models[1].parameters.weight"
    ]


def weighted(base: Path, loras: dict[str, Path], weights) -> torch.nn.Module:
    """Add weighted task vectors with PEFT and torch: the base plus the sum of the folded LoRAs' changes."""
    model = tiny.load_merged(base, None)
    start = {name: value.double() for name, value in model.state_dict().items()}
    total = {name: value.clone() for name, value in start.items()}
    for name, weight in zip(("plain", "rslora"), weights, strict=True):
        for key, value in tiny.load_merged(base, loras[name]).state_dict().items():
            total[key] += weight * (value.double() - start[key])
    model.load_state_dict({name: value.float() for name, value in total.items()})
    return model


@pytest.fixture(scope="module")
def planted(base, loras, tmp_path_factory) -> dict[str, Path]:
    """Prompts and what the merge with the planted weights answers, in two files."""
    folder = tmp_path_factory.mktemp("planted")
    model, tokenizer = weighted(base, loras, PLANTED), load_tokenizer(base)
    files = {}
    for name in ("tune", "test"):
        rows = []
        for i in range(ROWS):
            prompt = f"{name} {i * 37}?"
            ids = tiny.greedy(model, tokenizer.encode(prompt), 6)
            ids = ids[: ids.index(257)] if 257 in ids else ids
            rows.append({"prompt": prompt, "completion": tokenizer.decode(ids, skip_special_tokens=True)})
        files[name] = folder / f"{name}.jsonl"
        write_rows(files[name], rows)
    return files


def merge_spec(base, loras, weights=(0.25, 0.25), **changes):
    models = [
        {"model": str(loras[name]), "parameters": {"weight": weight}}
        for name, weight in zip(("plain", "rslora"), weights, strict=True)
    ]
    block = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    return block | {"output": {"type": "adapter"}} | changes


def spec_of(base, loras, planted, **changes):
    tasks = {"t": {"data": str(planted["tune"]), "max_tokens": 6}}
    options = {"parameters": [{"path": "models[*].parameters.weight", "low": 0, "high": 1}]}
    merge = merge_spec(base, loras)
    return {"merge": merge, "search": options, "tasks": tasks, "device": "cpu"} | changes


GRID = {
    "method": "grid",
    "parameters": [
        {"path": "models[0].parameters.weight", "low": 0.25, "high": 1, "points": 4},
        {"path": "models[1].parameters.weight", "low": 0, "high": 1, "points": 3},
    ],
}


def entries(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def score_of_spec(spec: Path, base: Path, task: dict, folder: Path) -> float:
    """Merge a spec and evaluate what was written, apart from the search."""
    toolkit.merge(spec, folder, quiet=True)
    if (folder / "adapter_config.json").is_file():
        table = {"base": str(base), "adapters": {"m": str(folder)}, "rows": {"m": "m"}}
    else:
        table = {"base": str(base), "models": {"m": str(folder)}, "rows": {"m": "m"}}
    return evaluate(table | {"tasks": {"t": task}, "device": "cpu"}, quiet=True).numbers["scores"]["m"]["t"]


def test_grid_finds_planted_weights(base, loras, planted, tmp_path):
    test = {"t": {"data": str(planted["test"]), "max_tokens": 6}}
    spec = spec_of(base, loras, planted, search=GRID, test=test)
    result = search(spec, tmp_path / "out", quiet=True)
    assert tuple(result.best.values()) == PLANTED
    assert list(result.best) == ["models[0].parameters.weight", "models[1].parameters.weight"]
    numbers = result.numbers
    assert numbers["tuning"]["tuned"] == {"score": 100.0, "scores": {"t": 100.0}}
    assert numbers["tuning"]["untuned"]["score"] < 100
    assert numbers["data"] == "test"
    candidates = [e for e in entries(tmp_path / "out") if "values" in e]
    assert [c["score"] for c in candidates].count(100) == 1
    assert len(candidates) == numbers["evaluations"] == 13
    written = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert written == merge_spec(base, loras, PLANTED)
    assert score_of_spec(tmp_path / "out" / "best.yaml", base, test["t"], tmp_path / "again") == 100
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / "merged" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    adapters = {n: str(loras[n]) for n in ("plain", "rslora")}
    table = {"base": str(base), "adapters": adapters, "tasks": test, "device": "cpu"}
    wanted = evaluate(table, quiet=True).numbers["scores"]
    untuned = tmp_path / "untuned.yaml"
    untuned.write_text(yaml.safe_dump(spec["merge"]))
    wanted["untuned merge"] = {"t": score_of_spec(untuned, base, test["t"], tmp_path / "untuned")}
    assert numbers["scores"] == wanted | {"tuned merge": {"t": 100.0}}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == numbers
    assert "| tuned merge | 100.0 | 100.0 |" in (tmp_path / "out" / "results.md").read_text()
    assert not list((tmp_path / "out").glob(".*")), "nothing is left of the work"


def test_perplexity_of_every_candidate_is_that_of_transformers(base, loras, planted, tmp_path):
    texts = ["a first text", "another one of more words"]
    write_rows(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    tasks = {
        "text": {"data": str(tmp_path / "text.jsonl"), "metric": "perplexity"},
        "t": {"data": str(planted["tune"]), "max_tokens": 6},
    }
    options = {"budget": 7, "seed": 1}
    search(spec_of(base, loras, planted, tasks=tasks, search=options), tmp_path / "out", quiet=True)
    tokenizer = load_tokenizer(base)
    candidates = [e for e in entries(tmp_path / "out") if "values" in e]
    assert len(candidates) == 7
    for found in candidates:
        model = weighted(base, loras, found["values"].values())
        total, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([[*tokenizer.encode(text), 257]])
            with torch.inference_mode():
                total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert found["scores"]["text"] == pytest.approx(math.exp(total / count), rel=1e-4)
        probability = 100 * math.exp(-total / count)
        assert found["score"] == pytest.approx((probability + found["scores"]["t"]) / 2, rel=1e-4)
    best = max(candidates, key=lambda c: c["score"])
    again = score_of_spec(tmp_path / "out" / "best.yaml", base, tasks["text"], tmp_path / "again")
    assert again == best["scores"]["text"]
    assert best["score"] >= candidates[0]["score"]


def test_checkpoints_are_searched_too(base, loras, planted, tmp_path):
    merge = merge_spec(base, loras, (1.0, 1.0), merge_method="ties", output={"type": "checkpoint"})
    merge["models"] = [m | {"parameters": {"weight": 1.0, "density": 0.5}} for m in merge["models"]]
    merge["parameters"] = {"lambda": 0.5}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(merge | {"smoke": {"merge_method": "nonsense"}}))
    tasks = {"t": {"data": str(planted["tune"]), "metric": "perplexity"}}
    options = {"method": "random", "budget": 5, "parameters": ["parameters.lambda"]}
    options["parameters"].append({"path": "models[*].parameters.density", "low": 0.1, "high": 1})
    spec = {"merge": str(tmp_path / "merge.yaml"), "search": options, "tasks": tasks, "device": "cpu"}
    result = search(spec, tmp_path / "out", overrides=["merged=false"], quiet=True)
    again = score_of_spec(tmp_path / "out" / "best.yaml", base, tasks["t"], tmp_path / "again")
    assert result.numbers["tuning"]["tuned"]["scores"]["t"] == again
    assert (tmp_path / "again" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "merged").exists()
    assert result.numbers["scores"]["tuned merge"]["t"] <= result.numbers["scores"]["untuned merge"]["t"]


def test_start_that_nothing_beats_stays(base, loras, planted, tmp_path):
    spec = spec_of(base, loras, planted, merge=merge_spec(base, loras, PLANTED), merged=False)
    result = search(spec, tmp_path / "out", overrides=["search.budget=7"], quiet=True)
    assert tuple(result.best.values()) == PLANTED
    assert result.numbers["tuning"]["tuned"] == result.numbers["tuning"]["untuned"]
    assert result.numbers["tuning"]["tuned"]["score"] == 100


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(base, loras, planted, tmp_path_factory) -> tuple[dict, dict[str, bytes]]:
    """A search, and all that it writes."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    spec = spec_of(base, loras, planted, holdout=0.5, search={"budget": 9, "population": 4})
    search(spec, out, quiet=True)
    return spec, files_of(out)


@pytest.mark.parametrize("stop", [1, 3, 8])
def test_resumed_search_is_the_uninterrupted_one(stop, uninterrupted, tmp_path, monkeypatch):
    (spec, wanted), out = uninterrupted, tmp_path / "out"
    measured: list[object] = []
    original = Judge.merge

    def stopping(self, *args):
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append(args)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "merge", stopping)
        with pytest.raises(KeyboardInterrupt):
            search(spec, out, quiet=True)
    assert not out.exists()
    journal = tmp_path / ".out.partial" / "history.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"values": {"models[0]')
    with pytest.raises(OutputError, match="holds a search of another spec"):
        search(spec, out, overrides=["search.seed=9"], resume=True, quiet=True)
    again: list[object] = []

    def counting(self, *args):
        again.append(args)
        return original(self, *args)

    monkeypatch.setattr(Judge, "merge", counting)
    search(spec, out, resume=True, quiet=True)
    # The folder's own name is in its results.
    named = json.loads(wanted["results.json"]) | {"path": str(out)}
    assert files_of(out) == wanted | {"results.json": (json.dumps(named, indent=2) + "\n").encode()}
    assert len(measured) + len(again) == 11, "9 candidates, and both merges on the rows that were held out"
    with pytest.raises(OutputError, match="exists already"):
        search(spec, out, resume=True, quiet=True)


@pytest.mark.parametrize("changed", ["model", "data", "spec", "nothing"])
def test_search_is_resumed_with_what_it_began_with(changed, base, loras, planted, tmp_path, monkeypatch):
    model, data, out = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out"
    shutil.copytree(loras["plain"], model)
    shutil.copyfile(planted["tune"], data)
    spec = spec_of(base, loras | {"plain": model}, {"tune": data}, search={"method": "random", "budget": 2})

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            search(spec, out, quiet=True)
    if changed == "model":
        weights = model / "adapter_model.safetensors"
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1_000_000_000))
    elif changed == "data":
        data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    overrides = ["tasks.t.max_tokens=5"] if changed == "spec" else []
    if changed == "nothing":
        assert search(spec, out, resume=True, quiet=True).path == out
    else:
        with pytest.raises(OutputError, match="holds a search of another spec, or of models or data that changed"):
            search(spec, out, overrides=overrides, resume=True, quiet=True)


def test_journal_of_other_candidates_is_refused(base, loras, planted, tmp_path, monkeypatch):
    spec, out = spec_of(base, loras, planted), tmp_path / "out"
    calls: list[object] = []
    original = Judge.merge

    def stopping(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "merge", stopping)
        with pytest.raises(KeyboardInterrupt):
            search(spec, out, quiet=True)
    journal = tmp_path / ".out.partial" / "history.jsonl"
    lines = journal.read_text().splitlines()
    changed = json.loads(lines[-1])
    changed["values"]["models[0].parameters.weight"] += 0.001
    journal.write_text("\n".join([*lines[:-1], json.dumps(changed)]) + "\n")
    with pytest.raises(OutputError, match=f"line {len(lines)} is not of what this search measures now"):
        search(spec, out, resume=True, quiet=True)


def test_held_out_rows_are_not_tuned_on(base, loras, planted, tmp_path):
    tasks = {"a/b": {"data": [str(f) for f in planted.values()], "max_tokens": 6, "limit": 10}}
    options = {"method": "random", "budget": 2}
    spec = spec_of(base, loras, planted, tasks=tasks, holdout=0.3, search=options, merged=False)
    result = search(spec, tmp_path / "out", quiet=True)
    lines = [line for file in planted.values() for line in file.read_text().splitlines()][:10]
    tuning, test = (
        (tmp_path / "out" / "data" / f"a%2Fb.{p}.jsonl").read_text().splitlines() for p in ("tuning", "test")
    )
    assert sorted(tuning + test) == sorted(lines)
    assert [lines.index(line) for line in test] == [3, 6, 9]
    task = {"data": str(tmp_path / "out" / "data" / "a%2Fb.test.jsonl"), "max_tokens": 6}
    again = score_of_spec(tmp_path / "out" / "best.yaml", base, task, tmp_path / "again")
    assert result.numbers["scores"]["tuned merge"]["a/b"] == again
    with pytest.raises(DataError, match=r"tasks\.t: holdout 0\.1 takes 0 of 6 rows"):
        search(spec_of(base, loras, planted, holdout=0.1), tmp_path / "no", quiet=True)
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / ".no.partial").exists()


def test_candidate_beyond_all_measure_does_not_stop_the_search(base, loras, planted, tmp_path):
    parameters = [{"path": "models[0].parameters.weight", "low": 0.25, "high": 1e38, "points": 2}]
    options = {"method": "grid", "parameters": parameters}
    result = search(spec_of(base, loras, planted, search=options), tmp_path / "out", quiet=True)
    last = entries(tmp_path / "out")[-1]
    assert last["score"] == 0
    assert "no numbers" in last["error"]
    assert result.numbers["failed"] == 1
    assert tuple(result.best.values()) == (0.25,)
    spec = spec_of(base, loras, planted, merge=merge_spec(base, loras, (1e38, 0)), search=options)
    with pytest.raises(toolkit.errors.ToolkitError, match="no numbers"):
        search(spec, tmp_path / "bad", quiet=True)


def test_inputs_of_every_kind_are_rows(base, loras, planted, tmp_path):
    whole = tiny.save_lora(base, tmp_path / "whole" / "plain", modules_to_save=["lm_head"])
    full = tmp_path / "full"
    models = [{"model": f"{base}+{loras['dora']}"}, {"model": str(whole)}, {"model": str(loras["plain"])}]
    toolkit.merge({"merge_method": "linear", "models": models[:1], "parameters": {"weight": 1}}, full, quiet=True)
    models = [m | {"parameters": {"weight": 0.2}} for m in [*models, {"model": str(full)}]]
    merge = {"merge_method": "linear", "base_model": str(base), "models": models, "parameters": {"normalize": False}}
    tasks = {"t": {"data": str(planted["tune"]), "metric": "perplexity"}}
    options = {"method": "random", "budget": 2}
    spec = spec_of(base, loras, planted, merge=merge, tasks=tasks, search=options, merged=False)
    scores = search(spec, tmp_path / "out", quiet=True).numbers["scores"]
    labels = ["base", "dora", str(whole), str(loras["plain"]), "full", "untuned merge", "tuned merge"]
    assert list(scores) == labels
    assert scores["dora"]["t"] == pytest.approx(scores["full"]["t"], rel=1e-4)
    table = {"base": str(base), "adapters": {"plain": str(loras["plain"])}, "tasks": tasks, "device": "cpu"}
    wanted = evaluate(table, quiet=True).numbers["scores"]
    assert scores[str(loras["plain"])] == wanted["plain"]
    folded = tmp_path / "folded"
    tiny.save_model(tiny.load_merged(base, whole), folded)
    table = {"base": str(folded), "tasks": tasks, "device": "cpu"}
    assert scores[str(whole)]["t"] == pytest.approx(
        evaluate(table, quiet=True).numbers["scores"]["base"]["t"], rel=1e-4
    )


def test_a_merge_spec_with_a_search_is_one(base, loras, planted, tmp_path, capsys):
    apart = spec_of(base, loras, planted, search={"budget": 7})
    spec = apart.pop("merge") | apart
    search(spec_of(base, loras, planted, search={"budget": 7}), tmp_path / "apart", quiet=True)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    assert main(["search", str(tmp_path / "spec.yaml"), str(tmp_path / "out"), "-q"]) == 0
    for name in ("history.jsonl", "best.yaml", "results.md", "merged/adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "apart" / name).read_bytes()
    assert main(["merge", str(tmp_path / "spec.yaml"), str(tmp_path / "merged"), "-q"]) == 2
    assert "search: its coefficients are to be tuned first, by `toolkit search SPEC OUT`" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_faults_of_a_merge_spec_with_a_search_are_at_its_own_keys(base, loras, planted, tmp_path):
    apart = spec_of(base, loras, planted)
    spec = apart.pop("merge") | apart
    spec["models"][1]["model"] = str(tmp_path / "nowhere")
    text = yaml.safe_dump(spec, sort_keys=False)
    (tmp_path / "s.yaml").write_text(text)
    line = 1 + next(i for i, row in enumerate(text.splitlines()) if "nowhere" in row)
    with pytest.raises(SpecError, match=rf"line {line}: models\[1\]\.model: .*nowhere"):
        search(tmp_path / "s.yaml", tmp_path / "out", quiet=True)
    with pytest.raises(SpecError, match="paramters: unknown key 'paramters'; did you mean 'parameters'"):
        search(spec | {"paramters": {}}, tmp_path / "out", quiet=True)
    with pytest.raises(SpecError, match="taskz: unknown key 'taskz'; did you mean 'tasks'"):
        search(spec | {"taskz": {}}, tmp_path / "out", quiet=True)
    with pytest.raises(SpecError, match=r"models\[0\]\.wieght: unknown key 'wieght'"):
        search(spec | {"models": [{"model": "a", "wieght": 1}]}, tmp_path / "out", quiet=True)


def test_a_merge_may_be_an_input(base, loras, planted, tmp_path):
    """Its row is what it would score if it were written out, and its own numbers can be free."""
    inner = merge_spec(base, loras, (0.3, 0.9), output={"type": "checkpoint"})
    del inner["output"]
    models = [
        {"model": inner, "parameters": {"weight": 0.5}},
        {"model": str(loras["plain"]), "parameters": {"weight": 1}},
    ]
    merge = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    tasks = {"t": {"data": str(planted["tune"]), "metric": "perplexity"}}
    free = "models[0].model.models[1].parameters.weight"
    options = {"method": "random", "budget": 3, "parameters": [free]}
    spec = {"merge": merge, "tasks": tasks, "search": options, "merged": False, "device": "cpu"}
    result = search(spec, tmp_path / "out", quiet=True)
    assert list(result.best) == [free]
    label = "models[0].model (task_arithmetic of 2)"
    assert list(result.numbers["scores"]) == ["base", loras["plain"].name, label, "untuned merge", "tuned merge"]
    (tmp_path / "inner.yaml").write_text(yaml.safe_dump(inner))
    wanted = score_of_spec(tmp_path / "inner.yaml", base, tasks["t"], tmp_path / "inner")
    assert result.numbers["scores"][label]["t"] == wanted
    again = score_of_spec(tmp_path / "out" / "best.yaml", base, tasks["t"], tmp_path / "again")
    assert again == result.numbers["tuning"]["tuned"]["scores"]["t"]


def test_a_merge_may_be_the_base(base, loras, planted, tmp_path):
    """Its row and those of LoRAs on it are what would be scored if it were written out."""
    inner = merge_spec(base, loras, (0.3, 0.9), dtype="float32")
    del inner["output"]
    models = [{"model": str(loras["few"]), "parameters": {"weight": 0.5}}]
    merge = {"merge_method": "task_arithmetic", "base_model": inner, "models": models}
    tasks = {"t": {"data": str(planted["tune"]), "metric": "perplexity"}}
    options = {"method": "random", "budget": 3, "parameters": ["base_model.models[1].parameters.weight"]}
    spec = {"merge": merge, "tasks": tasks, "search": options, "merged": False, "device": "cpu"}
    result = search(spec, tmp_path / "out", quiet=True)
    scores = result.numbers["scores"]
    assert list(scores) == ["base", loras["few"].name, "untuned merge", "tuned merge"]
    (tmp_path / "inner.yaml").write_text(yaml.safe_dump(inner))
    assert scores["base"]["t"] == score_of_spec(tmp_path / "inner.yaml", base, tasks["t"], tmp_path / "inner")
    on_it = {"base": str(tmp_path / "inner"), "adapters": {"m": str(loras["few"])}, "tasks": tasks, "device": "cpu"}
    wanted = evaluate(on_it | {"rows": {"m": "m"}}, quiet=True).numbers["scores"]["m"]["t"]
    assert scores[loras["few"].name]["t"] == pytest.approx(wanted, rel=1e-4)
    again = score_of_spec(tmp_path / "out" / "best.yaml", base, tasks["t"], tmp_path / "again")
    assert again == result.numbers["tuning"]["tuned"]["scores"]["t"]
    with pytest.raises(SpecError, match=r"merge\.base_model: is a merge, and a change of it could not name it"):
        search(spec | {"merge": merge | {"output": {"type": "adapter"}}}, tmp_path / "no", quiet=True)


def test_command_line_without_a_spec(base, loras, planted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = [f"--adapter=a={loras['plain']}", f"--adapter=b={loras['rslora']}"]
    data = [f"--data=t={planted['tune']}", f"--test=u={planted['test']}", "--max-tokens=6"]
    options = ["--set", "search.parameters=[{path: models, high: 1, points: 3}]", "--method=grid", "--json", "-q"]
    assert main(["search", "out", f"--base={base}", *models, *data, *options]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert list(numbers["scores"]) == ["base", "a", "b", "untuned merge", "tuned merge"]
    assert numbers["evaluations"] == 10
    assert sum("values" in entry for entry in entries(tmp_path / "out")) == 9, "the start is a point of the grid"
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    start = merge_spec(base, loras, (0.5, 0.5))
    assert numbers["start"] == {f"models[{i}].parameters.weight": 0.5 for i in (0, 1)}
    assert best == merge_spec(base, loras, numbers["best"].values())
    assert {**best, "models": start["models"]} == start
    tuned = {
        "base": str(base),
        "adapters": {"m": "out/merged"},
        "tasks": {"u": {"data": str(planted["test"]), "max_tokens": 6}},
    }
    assert evaluate(tuned, quiet=True).numbers["scores"]["m"] == numbers["scores"]["tuned merge"]
    dora = [f"--model=a={loras['plain']}", f"--model=b={loras['dora']}"]
    options = ["--metric=perplexity", "--budget=2", "--method=random", "-q", "--overwrite"]
    assert main(["search", "out", f"--base={base}", *dora, *data[:1], *options]) == 0
    assert "tuning data" in capsys.readouterr().out
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file(), "sums of DoRAs are no LoRAs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s.yaml", "out", "--base", "b"], "stand for a spec; change one with --set KEY=VALUE"),
        (["s.yaml", "out", "--limit", "3"], "stand for a spec; change one with --set KEY=VALUE"),
        (["out", "more", "--base", "b"], "expected OUT, got out more"),
        (["s.yaml", "out", "more"], "expected SPEC OUT, got s.yaml out more"),
        (["out", "--data", "x"], "--data 'x' is not of the form name=path"),
        (["out", "--base", "b"], "tasks: required key is missing"),
        (["out", "--base", "b", "--data", "t=x.jsonl"], "models: required where there is no merge"),
    ],
)
def test_command_lines_that_are_wrong(arguments, message, capsys):
    assert main(["search", *arguments]) == 2
    assert message in capsys.readouterr().err


WEIGHT = "models[0].parameters.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search.parameters": [{"path": "parameters.lambada"}]}, "search.parameters[0]: no number of the merge's"),
        ({"search.parameters": ["models[2].parameters.weight"]}, "did you mean 'models[1].parameters.weight'"),
        ({"search.parameters": [{"path": WEIGHT, "low": 1, "high": 0.5}]}, "search.parameters[0]: low 1 is not below"),
        ({"search.parameters": [{"path": WEIGHT, "log": True}]}, "search.parameters[0]: log needs a low above 0"),
        ({"search.parameters": [{"path": WEIGHT, "low": 0.3}]}, f"{WEIGHT} is 0.25 in the merge, which is not within"),
        ({"search.parameters": ["models[*].parameters", WEIGHT]}, f"search.parameters[1]: {WEIGHT} is free already"),
        ({"search.parameters": [{"path": WEIGHT, "points": 1}]}, "search.parameters[0].points: "),
        ({"search.budget": 6}, "search.budget: 6 is too few: the merge as given and one population of 6 make 7"),
        ({"search.population": 60, "search.budget": 60}, "search.budget: 60 is too few"),
        ({"search.method": "grid", "search.budget": 25}, "the merge as given and the grid's 25 points make 26"),
        ({"search.method": "grid", "search.sigma": 0.1}, "search: sigma is an option of method cma, not of grid"),
        ({"search.method": "annealing"}, "search.method: "),
        ({"search.bugdet": 3}, "search.bugdet: unknown key 'bugdet'; did you mean 'budget'"),
        ({"tasks": {}}, "tasks: Dictionary should have at least 1 item"),
        ({"test": {"u": "TUNE"}}, "test.u: TUNE is what t is tuned on"),
        ({"test": {"u": "TEST"}, "holdout": 0.5}, "give either test or holdout"),
        ({"base": "b"}, "give either merge, or base and models"),
        ({"merge": None}, "give either merge, or base and models"),
        ({"merge": None, "models": {"a": "x"}}, "base: required where there is no merge"),
        ({"merge": None, "base": "b", "models": {"base": "x"}}, "the name 'base' is that of another row"),
        ({"merge": None, "base": "BASE", "models": {"a": "nowhere"}}, "nowhere: no such folder"),
        ({"merge.merge_method": "tiees"}, "merge.merge_method: unknown merge method 'tiees'"),
        ({"merge.models": [{"model": "PLAIN"}]}, "search.parameters: required: the models have no weights"),
        (
            {"merge.models": [{"model": "PLAIN", "parameters": {"weight": 1, "sparsity": 1}}]},
            "merge.models[0].parameters.sparsity: task_arithmetic has no parameter 'sparsity'",
        ),
        (
            {
                "merge.merge_method": "ties",
                "merge.parameters": {"density": 0.5},
                "search.parameters": ["parameters.density"],
            },
            "merge.parameters.density: Input should be greater than 0, got 0.0",
        ),
    ],
)
def test_bad_specs(changes, message, base, loras, planted, tmp_path):
    places = {"TUNE": planted["tune"], "TEST": planted["test"], "PLAIN": loras["plain"], "BASE": base}

    def filled(value):
        for word, path in places.items():
            value = value.replace(word, str(path))
        return value

    spec = spec_of(base, loras, planted, search={})
    for path, value in changes.items():
        *outer, last = path.split(".")
        here = spec
        for key in outer:
            here = here[key]
        here[last] = json.loads(filled(json.dumps(value)))
    with pytest.raises((SpecError, MissingError)) as caught:
        search(spec, tmp_path / "out", quiet=True)
    assert filled(message) in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_faults_of_a_file_have_lines_and_models_in_memory_are_refused(base, loras, planted, tmp_path):
    spec = spec_of(base, loras, planted)
    spec["merge"]["models"][1]["model"] = str(tmp_path / "nowhere")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    line = 1 + next(i for i, text in enumerate(yaml.safe_dump(spec, sort_keys=False).splitlines()) if "nowhere" in text)
    with pytest.raises(SpecError, match=rf"line {line}: merge\.models\[1\]\.model: .*nowhere"):
        search(tmp_path / "s.yaml", tmp_path / "out", quiet=True)
    spec["merge"]["models"][1]["model"] = tiny.load_merged(base, None)
    with pytest.raises(SpecError, match=r"merge\.models\[1\]\.model: a folder or a hub id is needed"):
        search(spec, tmp_path / "out", quiet=True)
    with pytest.raises(SpecError, match="out: required"):
        search(spec_of(base, loras, planted), quiet=True)
    whole = tiny.save_lora(base, tmp_path / "whole", modules_to_save=["lm_head"])
    spec["merge"]["models"][1]["model"] = str(whole)
    with pytest.raises(SpecError, match=r"merge\.models\[1\]\.model: stores lm_head\.weight whole"):
        search(spec, tmp_path / "out", quiet=True)


def test_search_is_a_step_of_a_recipe(base, loras, planted, tmp_path):
    spec = spec_of(base, loras, planted, search={"method": "random", "budget": 2})
    table = {"base": str(base), "adapters": {"tuned": "${tune}/merged"}, "tasks": spec["tasks"], "device": "cpu"}
    recipe = {"steps": {"tune": {"search": spec}, "scores": {"evaluate": table}}}
    results = run_recipe(recipe, tmp_path / "out", quiet=True).results
    assert results["scores"]["scores"]["tuned"] == results["tune"]["tuning"]["tuned"]["scores"]


def test_recipe_is_a_search():
    loaded = specs.load(RECIPES / "merge" / "search.yaml", SearchSpec, smoke=True)
    assert loaded.merge is not None
    _, problems = make_space(loaded.merge.model_dump(mode="json", by_alias=True, exclude_unset=True), loaded.search)
    assert not problems
