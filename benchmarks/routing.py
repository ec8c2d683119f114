"""Measure routers on measured answers and on tasks: python -m benchmarks.routing --data DATA [--encoder FOLDER].

`DATA` holds `router/{mmlu,gsm8k}_weak_strong.jsonl` (see `benchmarks/routing_data.py`) and
`text_tasks/TASK/{train,test}.jsonl` (see `benchmarks/eight_tasks/make_data.py`). Prints tables and writes
`benchmarks/results/routing.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.eight_tasks.__main__ import packaged_encoder
from benchmarks.measure import machine
from toolkit.data.rows import read_rows, user_text
from toolkit.jobs.route import evaluate_router
from toolkit.routing.compare import compare_routers, embedded
from toolkit.routing.embedding import Embedder
from toolkit.routing.examples import labelled
from toolkit.routing.fit import fit_router
from toolkit.routing.router import kind_module
from toolkit.routing.spec import CompareSpec
from toolkit.specs import load
from toolkit.tables import Cell, Table

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "routing" / "compare.yaml"
LAST = {
    f"last layer, {kind}": {"router": kind, "features": "last"} for kind in ("knn", "linear", "classifier", "ensemble")
}
"""The encoder's last layer, beside the one that the recipe names."""

TASKS = "abc_news mmlu_area names polarity pros_cons rte subjectivity trec".split()
SAME = {"polarity", "subjectivity"}
"""Tasks that share a third of their texts, so that no router can part them."""
KINDS: dict[str, dict[str, Any]] = {
    "linear, sparse words": {"router": "linear", "words": {"dimensions": None}},
    "classifier": {"router": "classifier", "words": {}},
    "centroid": {"router": "centroid", "words": {}},
    "knn": {"router": "knn", "words": {}},
    "naive_bayes": {"router": "naive_bayes", "words": {}},
    "lora_retriever": {"router": "lora_retriever", "words": {}},
}
FAST = ("centroid", "knn", "naive_bayes", "lora_retriever")


def measured_answers(data: Path, encoder: Path) -> dict[str, Any]:
    """Compare the recipe's routers on MMLU, by rows and by whole subjects, and on GSM8K; print and return numbers."""
    found = {}
    kept: dict[str, dict[str, Embedder]] = {}
    for name, split in (("mmlu", "rows"), ("mmlu", "categories"), ("gsm8k", "rows")):
        spec = _spec(data / "router" / f"{name}_weak_strong.jsonl", split, encoder)
        if name not in kept:
            prompts = [user_text(row) for row in read_rows(spec.outcomes.data)]
            blocks = {seen: block.embedding for seen, block in spec.features.items()}
            kept[name] = {seen: embedded(block, prompts) for seen, block in blocks.items() if block}
        result = compare_routers(spec, embedders=kept[name])
        table = result.tables[0]
        print(f"\n{name}, {result.numbers['prompts']} prompts: {table.title}\n\n{table.to_markdown()}", flush=True)
        found[f"{name}/{split}"] = result.to_dict()
    print(f"\nAPGR of all\n\n{summary(found).to_markdown()}", flush=True)
    return found


def summary(answers: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the mean APGR of every way to choose, by data and split."""
    names = list(next(iter(answers.values()))["routers"])
    rows: list[list[Cell]] = []
    for name in names:
        by_data = [[one.get("apgr") for one in found["routers"][name]] for found in answers.values()]
        if all(None not in values for values in by_data):
            rows.append([name, *(statistics.mean(values) for values in by_data)])
    return Table(("chosen by", *answers), rows, digits=3)


def _spec(path: Path, split: str, encoder: Path) -> CompareSpec:
    recipe = load(RECIPE, CompareSpec).model_dump(exclude_defaults=True)
    recipe["outcomes"]["data"], recipe["split"] = [str(path)], split
    recipe["features"]["encoder"]["embedding"]["model"] = str(encoder)
    recipe["features"]["last"] = {"embedding": {"model": str(encoder)}, "form": recipe["features"]["encoder"]["form"]}
    recipe["routers"] |= LAST
    return CompareSpec.model_validate(recipe)


def tasks_as_experts(data: Path, limit: int) -> dict[str, Any]:
    """Choose the task from the text alone; print and return percent right and milliseconds per prompt."""
    found: dict[str, Any] = {}
    folder = data / "text_tasks"
    tests = {task: str(folder / task / "test.jsonl") for task in TASKS}
    prompts = [user_text(row) for file in tests.values() for row in read_rows(file)][::20]
    experts = {task: {"data": str(folder / task / "train.jsonl"), "limit": limit} for task in TASKS}
    for name, spec in KINDS.items():
        router = fit_router(spec | {"form": 0.3, "experts": experts, "folds": 0}, quiet=True)
        numbers = evaluate_router({"router": router, "data": tests}, quiet=True).numbers
        taken = [_seconds(lambda p=prompt, r=router: r.choose([p])) for prompt in prompts]
        merged = _right(numbers["confusion"])
        found[name] = {"accuracy": numbers["accuracy"], "merged": merged, "ms": 1000 * statistics.median(taken)}
    rows = [[name, *numbers.values()] for name, numbers in found.items()]
    columns = ("router", "right, percent", "two tasks as one", "ms per prompt")
    print(f"\n{len(TASKS)} tasks as experts, {limit} prompts each\n\n{Table(columns, rows, digits=2).to_markdown()}")
    return found


def _right(confusion: Mapping[str, Mapping[str, int]]) -> float:
    """Return percent right with the tasks of `SAME` as one."""
    same = lambda a, b: a == b or {a, b} == SAME  # noqa: E731
    right = sum(count for a, row in confusion.items() for b, count in row.items() if same(a, b))
    return 100 * right / sum(count for row in confusion.values() for count in row.values())


def a_thousand_experts() -> dict[str, float]:
    """Score one vector of 384 numbers against 1,000 experts of 20 prompts; print and return the milliseconds."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(1000), 20)
    x = (rng.standard_normal((len(owner), 384)) + rng.standard_normal((1000, 384))[owner]).astype(np.float32)
    examples = labelled([f"e{i}" for i in range(1000)], [""] * len(owner), owner)
    found = {}
    for kind in FAST:
        module = kind_module(kind)
        state = module.fit(x, examples, module.Params())
        taken = [_seconds(lambda m=module, s=state: m.score(x[:1], s)) for _ in range(50)]
        found[kind] = 1000 * statistics.median(taken)
    table = Table(("router", "ms"), list(map(list, found.items())), digits=2)
    print(f"\n1,000 experts, without the features\n\n{table.to_markdown()}")
    return found


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(given: Sequence[str] | None = None) -> None:
    """Run all, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="by default all-MiniLM-L6-v2, from its package")
    parser.add_argument("--limit", type=int, default=2500, help="training prompts of each task (default: 2500)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "routing.json")
    arguments = parser.parse_args(given)
    found = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("composition-toolkit", "numpy", "torch")},
        "answers": measured_answers(arguments.data, arguments.encoder or packaged_encoder()),
        "tasks": tasks_as_experts(arguments.data, arguments.limit),
        "thousand": a_thousand_experts(),
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
