"""Evaluating, judging routers, inspecting and running recipes, on small models."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml

import toolkit
from tests import tiny
from toolkit.checkpoints.adapters import open_adapter
from toolkit.data.rows import write_rows
from toolkit.errors import CheckpointError, DataError, OutputError, SpecError, UnsupportedError
from toolkit.jobs.evaluate import evaluate
from toolkit.jobs.inspect import inspect
from toolkit.jobs.quickstart import quickstart
from toolkit.jobs.recipe import run_recipe
from toolkit.jobs.route import evaluate_router, explain_route
from toolkit.jobs.skills import write_skills
from toolkit.models.load import load_tokenizer
from toolkit.routing.fit import fit_router
from toolkit.routing.router import load_router

COUNT = 6


@pytest.fixture(scope="module")
def tasks(base, loras, tmp_path_factory) -> dict[str, Path]:
    """Tasks whose answers one adapter knows by construction: what it says greedily."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = load_tokenizer(base)
    files = {}
    for name in ("plain", "rslora"):
        model = tiny.load_merged(base, loras[name])
        rows = []
        for i in range(COUNT):
            prompt = f"{name} {i}?" if name == "plain" else f"the number {i * 17} of rs"
            ids = tiny.greedy(model, tokenizer.encode(prompt), 8)
            ids = ids[: ids.index(257)] if 257 in ids else ids
            rows.append({"prompt": prompt, "completion": tokenizer.decode(ids, skip_special_tokens=True)})
        files[name] = folder / f"{name}.jsonl"
        write_rows(files[name], rows)
    return files


@pytest.fixture(scope="module")
def router(base, tasks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("router") / "router"
    experts = {name: str(file) for name, file in tasks.items()}
    fit_router({"experts": experts, "embedding": {"model": str(base)}}, out, quiet=True)
    return out


def spec_of(base, loras, tasks, **changes):
    columns = {name: {"data": str(file), "max_tokens": 8} for name, file in tasks.items()}
    adapters = {name: str(loras[name]) for name in ("plain", "rslora")}
    return {"base": str(base), "adapters": adapters, "tasks": columns, "device": "cpu"} | changes


@pytest.mark.parametrize("over_http", [False, True])
def test_scores_of_adapters_routes_and_merges(over_http, base, loras, tasks, router, tmp_path):
    merged = tmp_path / "merged"
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(loras["plain"])}],
        "parameters": {"weight": 1},
    }
    toolkit.merge(spec, merged, quiet=True)
    changes = {"models": {"merged": str(merged)}, "router": str(router), "over_http": over_http}
    result = evaluate(spec_of(base, loras, tasks, **changes), tmp_path / "out", quiet=True)
    scores = result.numbers["scores"]
    assert scores["plain"]["plain"] == scores["rslora"]["rslora"] == scores["merged"]["plain"] == 100
    assert scores["plain"]["rslora"] < 100
    assert scores["auto"] == {"plain": 100.0, "rslora": 100.0}
    assert result.tables[0].to_dicts()[0]["model"] == "base"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["scores"] == scores
    assert "| merged | 100.0 |" in (tmp_path / "out" / "results.md").read_text()
    assert "<table>" in result._repr_html_()


def test_rows_of_the_table_can_be_chosen(base, loras, tasks):
    rows = {"own adapter": {"plain": "plain", "rslora": "rslora"}, "base": "base"}
    scores = evaluate(spec_of(base, loras, tasks, rows=rows), quiet=True).numbers["scores"]
    assert list(scores) == ["own adapter", "base"]
    assert scores["own adapter"] == {"plain": 100.0, "rslora": 100.0}


def test_perplexity_is_that_of_transformers(base, loras, tasks, tmp_path):
    write_rows(tmp_path / "text.jsonl", [{"text": "a first text"}, {"text": "another, longer text of more words"}])
    columns = {"text": {"data": str(tmp_path / "text.jsonl"), "metric": "perplexity"}}
    scores = evaluate(spec_of(base, loras, tasks) | {"tasks": columns}, quiet=True).numbers["scores"]
    tokenizer = load_tokenizer(base)
    for name in ("base", "plain", "rslora"):
        model = tiny.load_merged(base, loras.get(name))
        total, count = 0.0, 0
        for text in ("a first text", "another, longer text of more words"):
            ids = torch.tensor([[*tokenizer.encode(text), 257]])
            with torch.inference_mode():
                total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert scores[name]["text"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"x": "nobody"}}, "rows.x: no model 'nobody' (known: base, plain, rslora)"),
        ({"rows": {"x": {"nothing": "base"}}}, "rows.x: no task 'nothing'"),
        ({"rows": {"x": "auto"}}, "no model 'auto'"),
        ({"tasks": {}}, "tasks: Dictionary should have at least 1 item"),
        ({"models": {"plain": "x"}}, "plain: both an adapter and a model"),
        ({"models": {"base": "x"}}, "models: the name 'base' means the base itself"),
        ({"adapters": {"auto": "x"}}, "adapters: the name 'auto' means what the router chooses"),
        ({"models": {"m": 5}}, "models.m: expected a folder, a hub id, or an object in memory, got 5"),
    ],
)
def test_bad_evaluations(change, message, base, loras, tasks):
    with pytest.raises(SpecError) as caught:
        evaluate(spec_of(base, loras, tasks) | change, quiet=True)
    assert message in str(caught.value)


def test_models_and_routers_can_be_objects(base, loras, tasks, router):
    merged = tiny.load_merged(base, loras["plain"])
    names = {"models": {"merged": (merged, load_tokenizer(base))}, "router": load_router(router)}
    pair = (tiny.load_merged(base, None), load_tokenizer(base))
    rows = {"rows": {"merged": {"plain": "merged"}, "auto": "auto"}}
    scores = evaluate(spec_of(pair, loras, tasks, **names, **rows) | {"base": pair}, quiet=True).numbers["scores"]
    assert scores == {"merged": {"plain": 100.0}, "auto": {"plain": 100.0, "rslora": 100.0}}
    data = {name: str(file) for name, file in tasks.items()}
    assert evaluate_router({"router": load_router(router), "data": data}, quiet=True).numbers["accuracy"] == 100
    assert inspect(pair, base).numbers["compatible"]
    assert inspect(load_router(router)).numbers["sources"][0]["experts"] == ["plain", "rslora"]


@pytest.mark.parametrize("over_http", [False, True])
def test_row_too_long_for_the_model_is_named(over_http, base, loras, tmp_path):
    rows = [{"prompt": "short", "completion": "x"}, {"prompt": "long " * tiny.CONTEXT, "completion": "x"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    spec = spec_of(base, loras, {"t": tmp_path / "rows.jsonl"}, over_http=over_http)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: \d+ tokens of prompt and 8 of answer .* tasks\.t\.max_tokens"):
        evaluate(spec, quiet=True)


def test_output_is_refused_before_anything_is_measured(base, loras, tasks, router, tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("x")

    def engine(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr("toolkit.jobs.evaluate.Engine", engine)
    monkeypatch.setattr("toolkit.jobs.route.Engine", engine)
    judged = {"router": str(router), "data": {"plain": str(tasks["plain"])}, "base": str(base)}
    for job, spec in ((evaluate, spec_of(base, loras, tasks)), (evaluate_router, judged)):
        with pytest.raises(OutputError, match="exists already"):
            job(spec, tmp_path, quiet=True)
        with pytest.raises(OutputError, match="exists already"):
            job(spec | {"out": str(tmp_path)}, quiet=True)
    assert (tmp_path / "mine").is_file()


def test_judged_router(base, loras, tasks, router, tmp_path):
    data = {name: str(file) for name, file in tasks.items()}
    adapters = {name: str(loras[name]) for name in tasks}
    spec = {
        "router": str(router),
        "data": data,
        "base": str(base),
        "adapters": adapters,
        "max_tokens": 8,
        "device": "cpu",
    }
    numbers = evaluate_router(spec, tmp_path / "out", quiet=True).numbers
    assert numbers["accuracy"] == 100
    quality = numbers["quality"]
    assert quality["router"] == quality["own expert"] == quality["oracle"] == 100
    assert quality["always base"] < 100
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == numbers
    only_choices = evaluate_router({"router": str(router), "data": data}, quiet=True).numbers
    assert "quality" not in only_choices
    assert only_choices["confusion"]["plain"] == {"plain": COUNT, "rslora": 0}
    with pytest.raises(SpecError, match=r"data\.nobody: not an expert of the router \(known: plain, rslora\)"):
        evaluate_router({"router": str(router), "data": {"nobody": data["plain"]}}, quiet=True)


def test_explained_route(router):
    numbers = explain_route(router, "plain 3?").numbers
    assert numbers["expert"] == "plain"
    assert list(numbers["scores"]) == ["plain", "rslora"]
    assert numbers["margin"] > 0
    assert explain_route(load_router(router), "plain 3?").numbers == numbers
    with pytest.raises(DataError, match=r"the prompt '\\udcff' is not UTF-8 text"):
        explain_route(router, "\udcff")


def test_inspected_checkpoint_adapter_and_router(base, loras, router):
    result = inspect(base, loras["patterns"], router)
    model, adapter, route = result.numbers["sources"]
    assert model["parameters"] == sum(p.numel() for p in tiny.llama().parameters())
    assert model["layers"] == {"model.layers": 3}
    assert model["dtypes"] == {"float32": len(tiny.llama().state_dict())}
    assert adapter["ranks"]["model.layers.1.mlp.up_proj"] == 1
    assert adapter["base_model"] == str(base)
    assert route["experts"] == ["plain", "rslora"]
    assert not result.numbers["compatible"]
    assert len(result.tables) == 4


def test_compatibility(base, loras, tmp_path):
    assert inspect(base, loras["plain"], loras["dora"], tiny.llama(5)).numbers["compatible"]
    other = tiny.save_model(tiny.llama(hidden_size=32, num_hidden_layers=4), tmp_path / "other")
    for second in (other, tiny.save_lora(other, tmp_path / "lora")):
        result = inspect(base, second)
        assert not result.numbers["compatible"]
        assert str(second) in result.numbers["faults"][0]


def test_first_of_several_misfits_does_not_depend_on_the_hash_seed(base, tmp_path):
    other = tiny.save_model(tiny.llama(hidden_size=32), tmp_path / "other")
    first, second = (tiny.save_lora(b, tmp_path / n) for b, n in ((base, "a"), (other, "b")))
    fault = inspect(first, second).numbers["faults"][-1]
    with closing(open_adapter(first)) as adapter:
        assert f": {min(adapter.parts)} is " in fault


def test_config_that_names_no_architecture(base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    for named in (5, [], [5], "LlamaForCausalLM"):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": named}))
        assert inspect(tmp_path / "model").numbers["sources"][0]["architecture"] is None


def test_broken_things_are_errors(base, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="truncated"):
        inspect(tmp_path)


def recipe(base, loras) -> dict:
    return {
        "steps": {
            # In the YAML a step may come before those it needs.
            "scores": {
                "evaluate": {
                    "base": str(base),
                    "adapters": {"m": "${both}"},
                    "tasks": {"t": "${skills}/sort.test.jsonl"},
                    "device": "cpu",
                }
            },
            "both": {
                "merge": {
                    "merge_method": "task_arithmetic",
                    "base_model": str(base),
                    "models": [{"model": str(loras["plain"])}, {"model": str(loras["few"])}],
                    "parameters": {"weight": 0.5},
                    "output": {"type": "adapter"},
                }
            },
            "skills": {"skills": {"skills": ["sort"], "train": 2, "test": 2}},
        },
        "smoke": {"steps": {"skills": {"skills": {"test": 1}}}},
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_feed_each_other_and_are_not_repeated(workers, base, loras, tmp_path):
    spec = recipe(base, loras) | {"workers": workers}
    out = tmp_path / "run"
    result = run_recipe(spec, out, quiet=True)
    assert set(result.numbers["seconds"]) == {"scores", "both", "skills"}
    assert set(result.results["scores"]["scores"]) == {"base", "m"}
    again = run_recipe(spec, out, quiet=True)
    assert again.numbers["seconds"] == {}
    assert again.results == result.results
    spec["steps"]["both"]["merge"]["parameters"]["weight"] = 0.25
    changed = run_recipe(spec, out, quiet=True)
    assert set(changed.numbers["seconds"]) == {"scores", "both"}, "what depends on a change is done again"


def test_smoke_block_makes_a_recipe_small(base, loras, tmp_path, capsys):
    result = run_recipe(recipe(base, loras), tmp_path / "run", smoke=True, quiet=True)
    assert not capsys.readouterr().err, "quiet steps show progress"
    assert result.results["scores"]["rows"] == {"t": 1}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"a": {"merge": {}, "train": {}}}, "a: a step is one job, such as train, got merge, train"),
        ({"a": {"murge": {}}}, "a: no job 'murge'; did you mean 'merge'?"),
        ({"a": {"merge": {"base_model": "${aa}"}}}, "steps.a: ${aa} is no step; did you mean 'a'?"),
        ({"a": {"merge": {"x": "${b}"}}, "b": {"merge": {"x": "${a}"}}}, "need each other in a circle: a, b"),
        ({"a": {"train": 5}}, "a.train: expected a spec, which is keys and values, got 5"),
        ({"../a": {"merge": {}}}, "'../a': a step's name is its folder's"),
    ],
)
def test_bad_recipes(steps, message, tmp_path):
    with pytest.raises(SpecError) as caught:
        run_recipe({"steps": steps}, tmp_path / "run", quiet=True)
    assert message in str(caught.value)


SKILLS = {"skills": ["sort"], "train": 2, "test": 1}


def test_faults_of_all_steps_are_told_with_their_lines_before_any_runs(base, tmp_path):
    lines = [
        "steps:",
        "  data: {skills: {skills: [sort], train: 2, test: 1}}",
        "  lora:",
        "    train:",
        "      bse: toolkit:base",
        "      data: {train: '${data}/sort.train.jsonl'}",
        "  both: {merge: {merge_method: linear}}",
        "  router: {route: {experts: {a: x.jsonl}, embedding: {model: x}, out: elsewhere}}",
    ]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(SpecError) as caught:
        run_recipe(tmp_path / "recipe.yaml", tmp_path / "run", quiet=True)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'recipe.yaml'}: ")
    assert "line 5: steps.lora.train.bse: unknown key 'bse'; did you mean 'base'?" in text
    assert "steps.lora.train.base: required key is missing" in text
    assert "line 7: steps.both.merge: give one of models" in text
    assert "line 8: steps.router.route.out: a step writes to its own folder" in text
    assert not (tmp_path / "run").exists()


def test_step_is_repeated_when_a_file_that_it_names_changes(base, tmp_path):
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"prompt": "1 2", "completion": "x"}] * 3)
    (tmp_path / "encoder").mkdir()
    for source in base.iterdir():
        shutil.copy2(source, tmp_path / "encoder")
    spec = {"steps": {"r": {"route": {"experts": {"a": str(file)}, "embedding": {"model": str(tmp_path / "encoder")}}}}}

    def repeated() -> bool:
        return set(run_recipe(spec, tmp_path / "run", quiet=True).numbers["seconds"]) == {"r"}

    assert repeated()
    assert not repeated()
    write_rows(file, [{"prompt": "1 3", "completion": "x"}] * 4)
    assert repeated()
    os.utime(tmp_path / "encoder" / "model.safetensors", ns=(1, 1))
    assert repeated()
    assert not repeated()


def test_step_is_repeated_by_another_version(tmp_path, monkeypatch):
    spec = {"steps": {"data": {"skills": SKILLS}}}
    run_recipe(spec, tmp_path / "run", quiet=True)
    assert run_recipe(spec, tmp_path / "run", quiet=True).numbers["seconds"] == {}
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run_recipe(spec, tmp_path / "moved", quiet=True).numbers["seconds"] == {}, "a run can be moved"
    monkeypatch.setattr("toolkit.jobs.recipe.versions", lambda: {"composition-toolkit": "99"})
    assert set(run_recipe(spec, tmp_path / "moved", quiet=True).numbers["seconds"]) == {"data"}


def test_folder_that_no_step_made_is_kept(tmp_path):
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    (run / "data" / "mine").write_text("x")
    spec = {"steps": {"first": {"skills": SKILLS}, "data": {"skills": SKILLS}}}
    with pytest.raises(OutputError, match=r"data: exists already and is not this recipe's"):
        run_recipe(spec, run, quiet=True)
    assert (run / "data" / "mine").read_text() == "x"
    assert not (run / "first").exists(), "nothing runs before that is told"
    (run / "data" / "mine").unlink()
    run_recipe(spec, run, quiet=True)
    (run / "data" / "sort.test.jsonl").unlink()
    spec["steps"]["data"] = {"skills": SKILLS | {"seed": 1}}
    run_recipe(spec, run, quiet=True)
    assert (run / "data" / "sort.test.jsonl").is_file(), "its own folder is replaced"
    with pytest.raises(OutputError, match="is a file; name a folder"):
        run_recipe(spec, run / "data" / "sort.test.jsonl", quiet=True)


def test_record_that_was_cut_off_counts_as_none(tmp_path):
    spec = {"steps": {"data": {"skills": SKILLS}}}
    whole = run_recipe(spec, tmp_path, quiet=True).results
    record = tmp_path / ".steps" / "data.json"
    for text in (record.read_text()[:30], "", "[]", "{}"):
        record.write_text(text)
        again = run_recipe(spec, tmp_path, quiet=True)
        assert set(again.numbers["seconds"]) == {"data"}
        assert again.results == whole


def test_quickstart_keeps_files_that_are_not_its_own(tmp_path):
    (tmp_path / "serve.yaml").write_text("mine")
    with pytest.raises(OutputError, match=r"serve\.yaml: exists already and is not the quickstart's"):
        quickstart(tmp_path, smoke=True, quiet=True)
    assert (tmp_path / "serve.yaml").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_fault_of_a_step_is_told_and_what_was_done_stays(workers, base, loras, tmp_path):
    spec = recipe(base, loras) | {"workers": workers}
    spec["steps"]["both"]["merge"]["parameters"] = {"wieght": 1}
    spec["steps"]["both"]["merge"]["models"].append({"model": "${skills}"})  # so that it comes after
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(SpecError) as caught:
        run_recipe(tmp_path / "recipe.yaml", tmp_path / "run", quiet=True)
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.yaml'}: ")
    fault = r"line \d+: steps\.both\.merge\.parameters\.wieght: task_arithmetic has no parameter 'wieght'; did you mean"
    assert re.search(fault, str(caught.value))
    assert (tmp_path / "run" / "skills" / "sort.train.jsonl").is_file()
    assert not (tmp_path / "run" / "both").exists()


def test_objects_in_memory_do_not_reach_other_processes(base, loras, tmp_path):
    spec = recipe(base, loras)
    spec["steps"]["both"]["merge"]["base_model"] = tiny.llama()
    with pytest.raises(SpecError, match=r"steps\.both\.merge: holds objects in memory; run the recipe with workers: 1"):
        run_recipe(spec | {"workers": 2}, tmp_path / "run", quiet=True)


def test_skill_data(tmp_path):
    write_skills({"train": 30, "test": 20, "seed": 1}, tmp_path / "a")
    write_skills({"train": 30, "test": 20, "seed": 1}, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 12
    with pytest.raises(SpecError, match="no skill 'sorted'; did you mean 'sort'"):
        write_skills({"skills": ["sorted"]}, tmp_path / "c")


def test_public_names_exist():
    for name in toolkit.__all__:
        assert callable(getattr(toolkit, name))
    with pytest.raises(AttributeError):
        _ = toolkit.nothing
    with pytest.raises(UnsupportedError):
        toolkit.inspect(3)
