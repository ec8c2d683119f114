"""`tall_masks`: the thresholds that brute force chooses, and the sizes that its paper's arithmetic gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import toolkit
from tests import tiny
from tests.merge.learned import problems
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.errors import SpecError
from toolkit.merge.extract import extract
from toolkit.merge.learning.heads import read_head
from toolkit.merge.run import merge

LAMBDAS = [0.1, 0.7, 1.5, 4.0]


def accuracy(state: dict[str, torch.Tensor], task: dict[str, str]) -> float:
    """Percent of right predictions, row by row, of an encoder that is put together here."""
    model, head = problems.bert(), read_head(task["head"])
    model.load_state_dict(state)
    found = [json.loads(line) for line in Path(task["data"]).read_text().splitlines()]
    right = 0
    for row in found:
        pooled = model(torch.tensor([list(row["text"].encode())])).last_hidden_state.mean(1)
        right += head.labels[int((pooled @ head.weight.T + head.bias).argmax())] == row["label"]
    return 100 * right / len(found)


@pytest.mark.system("tall_masks")
@torch.no_grad()
def test_every_threshold_is_the_best_on_its_own_rows(tmp_path):
    spec = problems.classification(tmp_path, tasks=3, count=40)
    spec["base_model"], spec["models"] = [
        str(p) if isinstance(p, Path) else p for p in problems.encoders(tmp_path / "far", 3, 0.3)
    ]
    with torch.enable_grad():
        given = {"method": "tall_masks", "parameters": {"lambdas": LAMBDAS}}
        result = toolkit.learn(spec | given, tmp_path / "out", quiet=True)
    start = problems.weights(spec["base_model"])
    taus = {task: {n: v - start[n] for n, v in problems.weights(m).items()} for task, m in spec["models"].items()}
    total = {name: sum(tau[name] for tau in taus.values()) for name in start}
    expected = {}
    for task, tau in taus.items():
        scores = []
        for value in LAMBDAS:
            rebuilt = {
                n: start[n]
                + (torch.where(tau[n].abs() > value * (total[n] - tau[n]).abs(), total[n], 0) if v.ndim > 1 else tau[n])
                for n, v in start.items()
            }
            scores.append(accuracy(rebuilt, spec["tasks"][task]))
        assert [result.numbers["candidates"][str(v)][task] for v in LAMBDAS] == pytest.approx(scores)
        expected[task] = LAMBDAS[scores.index(max(scores))]
        own = {n: start[n] + v for n, v in tau.items()}
        assert result.numbers["individual"][task] == pytest.approx(accuracy(own, spec["tasks"][task]))
    assert result.numbers["lambda"] == expected
    assert len(set(expected.values())) > 1, "the tasks disagree"
    config = json.loads((tmp_path / "out" / "compressed" / "delta_config.json").read_text())
    assert config["lambda"] == expected
    model = {"model": f"{tmp_path / 'out' / 'compressed'}#task1"}
    plain = {"merge_method": "task_arithmetic", "base_model": spec["base_model"], "models": [model]}
    merge(plain, tmp_path / "rebuilt", quiet=True)
    assert (
        accuracy(problems.weights(tmp_path / "rebuilt"), spec["tasks"]["task1"]) == result.numbers["accuracy"]["task1"]
    )


@pytest.mark.system("tall_masks")
@pytest.mark.parametrize(("dtype", "most"), [(None, 0.29), ("float16", 0.22)])
def test_eight_fine_tunes_take_the_promised_size(dtype, most, tmp_path):
    """Base, vector and eight masks over eight float32 models: `(64 + 8) / (32 * 8)`, or 48 in place of 64."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024}
    base = tiny.save_model(tiny.llama(**sizes), tmp_path / "base")
    tuned = {f"t{i}": str(tiny.save_model(tiny.tuned(tiny.llama(**sizes), i), tmp_path / f"t{i}")) for i in range(8)}
    options = {"dtype": dtype} if dtype else {}
    result = extract(base, tuned, tmp_path / "out", kind="mask", quiet=True, **options)
    with open_checkpoint(base) as checkpoint:
        full = checkpoint.nbytes
    share = (full + result.numbers["bytes_after"]) / (8 * full)
    assert share <= most
    exact = ((64 if dtype is None else 48) + 8) / (32 * 8)
    assert share == pytest.approx(exact, abs=0.008)


def test_every_model_needs_rows_of_its_own(tmp_path):
    spec = problems.classification(tmp_path) | {"method": "tall_masks"}
    del spec["tasks"]["task1"]
    with pytest.raises(SpecError, match=r"tasks\.task1: required: rows of this model's own task"):
        toolkit.learn(spec, tmp_path / "out", quiet=True)
