"""The benchmark of routers, on a small base and on rows made by hand, and the conversion of RouteLLM's tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import routing, routing_data
from toolkit.data.rows import read_rows, write_rows
from toolkit.errors import DataError, MissingError

ROWS = Path(__file__).parent.parent.parent / "recipes" / "routing" / "outcomes.jsonl"


def test_tables_of_routellm_become_rows(tmp_path, capsys):
    folder = tmp_path / "RouteLLM" / "routellm" / "evals"
    (folder / "mmlu" / "responses").mkdir(parents=True)
    (folder / "gsm8k").mkdir()
    head = "prompt,mixtral-8x7b-instruct-v0.1,gpt-4-1106-preview"
    (folder / "mmlu" / "responses" / "mmlu_anatomy.csv").write_text(
        f'{head}\n"Which, of\nthese?",True,False\nHow?,False,True\n'
    )
    (folder / "gsm8k" / "gsm8k_responses.csv").write_text(f"{head},gpt-4_response\nHow many?,False,True,It is 3.\n")
    routing_data.main([str(tmp_path / "RouteLLM"), str(tmp_path / "out")])
    assert capsys.readouterr().out == "mmlu: 2 rows\ngsm8k: 1 rows\n"
    found = [dict(row.data) for row in read_rows(tmp_path / "out" / "mmlu_weak_strong.jsonl")]
    assert found == [
        {"prompt": "Which, of\nthese?", "subject": "anatomy", "weak_correct": True, "strong_correct": False},
        {"prompt": "How?", "subject": "anatomy", "weak_correct": False, "strong_correct": True},
    ]
    (folder / "gsm8k" / "gsm8k_responses.csv").write_text("prompt,gpt-4\nHow many?,True\n")
    with pytest.raises(DataError, match=r"gsm8k_responses\.csv:2: expected one column of mixtral"):
        routing_data.main([str(tmp_path / "RouteLLM"), str(tmp_path / "again")])
    with pytest.raises(MissingError, match="no tables of MMLU"):
        routing_data.main([str(tmp_path), str(tmp_path / "again")])


def test_two_tasks_count_as_one():
    names = ["polarity", "subjectivity", "trec"]
    confusion = {a: {b: 1 + (a == b) for b in names} for a in names}
    assert routing._right(confusion) == pytest.approx(100 * (4 + 2 + 2) / 12)


@pytest.mark.slow
def test_benchmark_runs(tmp_path, base, capsys):
    (tmp_path / "router").mkdir()
    for name in ("mmlu", "gsm8k"):
        shutil.copy(ROWS, tmp_path / "router" / f"{name}_weak_strong.jsonl")
    for at, task in enumerate(routing.TASKS):
        folder = tmp_path / "text_tasks" / task
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            write_rows(folder / f"{split}.jsonl", [{"text": f"{task} of {i * at} and {split}"} for i in range(30)])
    recipe = routing.RECIPE.read_text().replace("layer: 4", "layer: 2")
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "RECIPE", tmp_path / "recipe.yaml")
        routing.main(
            ["--data", str(tmp_path), "--encoder", str(base), "--limit", "30", "--out", str(tmp_path / "out.json")]
        )
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["answers"]) == {"mmlu/rows", "mmlu/categories", "gsm8k/rows"}
    assert found["tasks"]["linear, sparse words"]["accuracy"] > 95
    shown = capsys.readouterr().out
    assert "| encoder, classifier | 0." in shown
    assert "1,000 experts, without the features" in shown
