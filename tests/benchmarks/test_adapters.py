"""The comparison of adapter methods: scores are those of greedy decoding, and nothing is measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.adapters import __main__ as comparison
from benchmarks.adapters import trial
from benchmarks.adapters.data import write_tasks
from benchmarks.adapters.spec import CompareSpec
from toolkit import specs
from toolkit.data.rows import read_rows
from toolkit.errors import MissingError, SpecError
from toolkit.models.load import load_model

LISTS = sorted((Path(comparison.__file__).parent).glob("*.yaml"))
SMALL: dict[str, Any] = {
    "skills": ["upper", "vowels"],
    "tasks": ["real"],
    "train": 24,
    "validation": 4,
    "test": 6,
    "training": {"max_steps": 2, "batch_size": 4},
    "rates": [0.002, 0.02],
    "tuned_on": ["upper"],
    "methods": [
        {"name": "LoRA", "adapter": {"method": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}},
        {"name": "LST", "adapter": {"method": "lst", "reduction": 8}, "rates": [0.01]},
        {"name": "all", "adapter": {"method": "vl_adapter", "size": 4}, "joint": True, "rates": [0.01]},
        {"name": "mixed", "adapter": {"method": "scalearn", "uniform": True}, "sources": "LoRA", "rates": [0.01]},
    ],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "real").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{split} {i}", "label": "ab"[i % 2]} for i in range(8)]
        (tmp_path / "data" / "real" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def run(data: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    return comparison.compare(specs.load(SMALL | changes, CompareSpec), out, data, quiet=True)


def test_small_comparison_goes_on_where_it_stopped(data, tmp_path, monkeypatch):
    rows = run(data, tmp_path / "out")
    assert [row["name"] for row in rows] == ["base", "LoRA", "LST", "all", "mixed"]
    assert all(set(row["scores"]) == {"upper", "vowels", "real"} for row in rows)
    sizes = [row["trainable_parameters"] for row in rows[1:]]
    layers, width, kv = 4, 192, 96
    assert sizes[0] == layers * 4 * (2 * width + width + kv)
    assert sizes[3] == layers * 2 * 1  # a number per source and module; of a skill's column there is one other skill
    assert rows[2]["peak_bytes"] < rows[1]["peak_bytes"]
    assert rows[1]["rate"] == min(rows[1]["validation_losses"], key=rows[1]["validation_losses"].get)
    monkeypatch.setattr(trial, "train", lambda *args, **options: pytest.fail("trained again"))
    assert run(data, tmp_path / "out") == json.loads(json.dumps(rows), object_hook=_numbers)
    (table,) = comparison.tables(specs.load(SMALL, CompareSpec), rows)
    assert table.to_markdown().count("\n") == 1 + len(rows) + (table.to_markdown().endswith("\n"))


def _numbers(value: dict[str, Any]) -> dict[Any, Any]:
    """Rates are keys, which JSON makes texts of."""
    return {float(key) if key.replace(".", "").isdigit() else key: found for key, found in value.items()}


def test_right_answers_are_those_of_greedy_decoding(tmp_path):
    spec = specs.load(
        SMALL | {"skills": ["upper"], "tasks": [], "test": 12, "methods": SMALL["methods"][:1]}, CompareSpec
    )
    (task,) = write_tasks(spec, None, tmp_path, 4)
    trials = trial.Trials(spec, [task], tmp_path / "longest.jsonl", tmp_path)
    loaded = load_model("toolkit:base")
    right = 0
    with torch.inference_mode():
        for row in read_rows(task.file("test")):
            question, answer = row.data["messages"]
            ids = loaded.tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
            out: Any = loaded.model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)
            right += loaded.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True) == answer["content"]
    found = trial._score(trials.train_spec(spec.methods[0], [task], 1.0, 0), loaded, task.file("test"))
    assert found.right == pytest.approx(100 * right / 12)


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.name)
def test_lists_are_valid(path, data, tmp_path):
    spec = specs.load(path, CompareSpec)
    spec = spec.model_copy(update={"tasks": (), "skills": ("upper", "vowels"), "tuned_on": ("upper",)})
    tasks = write_tasks(spec, None, tmp_path, 4)
    trial.Trials(spec, tasks, tmp_path / "longest.jsonl", tmp_path).check()


def test_mistakes(data, tmp_path, capsys):
    for changes, message in (
        ({"skills": ["uper"]}, "no skill 'uper'; did you mean 'upper'?"),
        ({"tuned_on": ["x"]}, "no task 'x'"),
        ({"tuned_on": []}, "several rates to choose from"),
        ({"methods": [SMALL["methods"][3]]}, "no method 'LoRA' above it"),
        ({"methods": [SMALL["methods"][0]] * 2}, "'LoRA' stands twice"),
    ):
        with pytest.raises(SpecError, match=message.replace("?", r"\?")):
            run(data, tmp_path / "out", **changes)
    with pytest.raises(MissingError, match="--data: required"):
        comparison.compare(specs.load(SMALL, CompareSpec), tmp_path / "out", None, quiet=True)
    assert comparison.main([str(LISTS[0]), str(tmp_path / "out"), "--quiet"]) == 1
    assert "error: --data: required" in capsys.readouterr().err
