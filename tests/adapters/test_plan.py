"""What is told before a run is what the run then is."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from toolkit.adapters import trainer as trainers
from toolkit.adapters.memory import saved_bytes
from toolkit.adapters.plan import plan_training, preview
from toolkit.adapters.runs import METRICS
from toolkit.adapters.train import train
from toolkit.cli import main
from toolkit.data.rows import write_rows
from toolkit.errors import DataError, SpecError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"say {i}: ", "completion": "y" * (1 + i * 7 % 40)} for i in range(21)]
    write_rows(folder / "a.jsonl", rows)
    write_rows(folder / "b.jsonl", [{"prompt": "b", "completion": str(i)} for i in range(5)])
    return folder


def spec_of(base: Path, data: Path, adapter: dict | None = None, **training) -> dict:
    return {
        "base": str(base),
        "adapter": adapter or {"method": "lora", "r": 4},
        "data": {"train": str(data / "a.jsonl")},
        "training": {"num_epochs": 2, "batch_size": 4, "logging_steps": 1} | training,
        "device": "cpu",
    }


@pytest.mark.parametrize("adapter", [{"method": "lora", "r": 4}, {"method": "full", "layers": [0]}, {"method": "ia3"}])
@pytest.mark.parametrize("training", [{}, {"gradient_accumulation_steps": 4}, {"max_steps": 2}])
def test_steps_and_parameters_are_those_of_the_run(adapter, training, base, data, tmp_path):
    spec = spec_of(base, data, adapter, **training)
    planned, done = plan_training(spec).numbers, train(spec, tmp_path / "out", quiet=True).numbers
    for key in ("steps", "trainable_parameters", "parameters", "data"):
        assert planned[key] == done[key]


def test_nothing_is_trained_or_written(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan_training(spec_of(base, data) | {"out": str(tmp_path / "out")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [24, 64])
@pytest.mark.parametrize(
    "adapter", [{"method": "lora", "r": 4}, {"method": "full"}, {"method": "prompt_tuning", "num_virtual_tokens": 4}]
)
def test_memory_is_what_tensors_of_the_run_take(length, adapter, base, data, tmp_path, monkeypatch):
    """Of the optimizer and the gradients as they are after a step; of activations as a batch of full length saves."""
    write_rows(tmp_path / "rows.jsonl", [{"text": "x" * (length - 1)}] * 4)
    spec = spec_of(base, data, adapter, max_steps=1) | {"data": {"train": str(tmp_path / "rows.jsonl")}}
    planned = plan_training(spec).numbers["memory"]
    seen = {}
    own_go = trainers.go

    def go(trainer, checkpoint):
        own_go(trainer, checkpoint)
        state = trainer.optimizer.state.values()
        seen["optimizer"] = sum(t.nbytes for s in state for t in s.values() if torch.is_tensor(t) and t.ndim)
        parameters = list(trainer.model.parameters())
        seen["gradients"] = sum(p.nbytes for p in parameters if p.requires_grad)
        seen["weights"] = sum(p.nbytes for p in parameters)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        trainer.model.train()
        seen["activations"] = saved_bytes(trainer.model, batch)

    monkeypatch.setattr(trainers, "go", go)
    train(spec, tmp_path / "out", quiet=True)
    assert {k: planned[k] for k in ("optimizer", "gradients")} == {k: seen[k] for k in ("optimizer", "gradients")}
    assert planned["weights"] == pytest.approx(seen["weights"], rel=0.01)  # and buffers
    virtual = 1 + adapter.get("num_virtual_tokens", 0) / length
    assert planned["activations"] == pytest.approx(seen["activations"], rel=0.03 + (virtual - 1))


def test_recomputing_activations_is_planned_to_save_memory(base, data):
    plain = plan_training(spec_of(base, data)).numbers["memory"]["activations"]
    saving = plan_training(spec_of(base, data, gradient_checkpointing=True)).numbers["memory"]["activations"]
    assert saving < 0.7 * plain


def test_bad_rows_and_specs_stop_the_plan_as_they_stop_the_run(base, data, tmp_path):
    write_rows(tmp_path / "bad.jsonl", [{"prompt": "x"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        plan_training(spec_of(base, data) | {"data": {"train": str(tmp_path / "bad.jsonl")}})
    with pytest.raises(SpecError, match="no method"):
        plan_training(spec_of(base, data, {"method": "nothing"}))


def test_rows_are_shown_with_what_is_trained(base, data):
    spec = spec_of(base, data)
    spec["data"]["train"] = [str(data / "a.jsonl"), str(data / "b.jsonl")]
    shown = preview(spec, 2)
    rows = shown.numbers["rows"]
    assert [row["place"] for row in rows] == [f"{data}/{n}.jsonl:{i}" for n in "ab" for i in (1, 2)]
    assert rows[1]["pieces"] == [("say 1: ", False), ("yyyyyyyy<|end|>", True)]
    assert (rows[1]["tokens"], rows[1]["trained"]) == (16, 9)
    spec["data"]["train_on_inputs"] = True
    (first, *_) = preview(spec, 1).numbers["rows"]
    assert first["pieces"] == [("s", False), ("ay 0: y<|end|>", True)], "no token predicts the first"
    console = Console(color_system="truecolor", width=80, record=True, file=io.StringIO())
    console.print(shown.texts()[1])
    assert "background-color: #008000" in console.export_html()
    assert 'background:#9fd8b4;color:black">yyyyyyyy&lt;|end|&gt;' in shown._repr_html_()


def test_command_line(base, data, tmp_path, capsys):
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(spec_of(base, data)))
    assert main(["train", str(path), "--show", "1"]) == 0
    assert "say 0: [[y<|end|>]]" in capsys.readouterr().out
    assert main(["train", str(path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 12
    assert main(["train", str(path), "--dry-run"]) == 0
    assert "activations" in capsys.readouterr().out


def test_losses_are_drawn(base, data, tmp_path):
    pytest.importorskip("matplotlib")
    from toolkit.adapters.plots import draw

    spec = spec_of(base, data, max_steps=4, eval_steps=2, report_to=["plot"])
    spec["data"]["validation"] = str(data / "b.jsonl")
    folder = train(spec, tmp_path / "out", quiet=True).path
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    entries = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    lines = {line.get_label(): line.get_xydata().tolist() for line in draw(entries).axes[0].get_lines()}
    for label, key in (("training", "loss"), ("validation", "eval_loss")):
        assert lines[label] == [[e["step"], e[key]] for e in entries if key in e]


def test_mixture_is_trained_as_its_weights_say(base, data, tmp_path):
    spec = spec_of(base, data, max_steps=1)
    sources = [{"path": str(data / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 1), ("b", 3))]
    spec["data"] = {"train": sources, "epoch_rows": 40}
    numbers = train(spec, tmp_path / "out", quiet=True).numbers["data"]
    assert list(numbers["sources"].values()) == [10, 30]
    assert numbers["rows"] == 26
    # Each of the five rows of b has 3 tokens, 2 of them trained, and comes six times.
    spec["data"] = {"train": [str(data / "b.jsonl")], "temperature": 2, "epoch_rows": 30}
    numbers = train(spec, tmp_path / "one", quiet=True).numbers["data"]
    assert (numbers["tokens"], numbers["trained"]) == (90, 60)


@pytest.mark.parametrize(
    ("data_spec", "message"),
    [
        ({"train": [{"path": "a", "weight": 1}, "b"]}, "some sources of train have a weight; give every one"),
        ({"train": [{"path": "a", "weight": 1}], "temperature": 2}, "leave one out"),
        ({"train": "a", "epoch_rows": 3}, "epoch_rows needs weights of the sources, or a temperature"),
        ({"train": [{"path": "a", "wieght": 1}]}, "did you mean 'weight'"),
        ({"train": []}, "data.train: Value should have at least 1 item"),
    ],
)
def test_bad_mixtures(data_spec, message, base, tmp_path):
    with pytest.raises(SpecError) as caught:
        train({"base": str(base), "data": data_spec}, tmp_path / "out", quiet=True)
    assert message in str(caught.value)


def test_tasks_of_rows_reach_the_method(base, data, tmp_path):
    """A module of POLY has one row of mixing logits per task; only rows of tasks that came up have moved."""
    adapter = {"method": "poly", "r": 2, "n_tasks": 3, "n_skills": 2}
    spec = spec_of(base, data, adapter, max_steps=9, learning_rate=0.05)
    sources = [{"path": str(data / f"{name}.jsonl"), "task": name} for name in "ab"]
    spec["data"] = {
        "train": [*sources, {"path": str(data / "a.jsonl"), "task": "a"}],
        "packing": True,
        "max_length": 60,
    }
    moved = train(spec, tmp_path / "out", quiet=True).path / "adapter_model.safetensors"
    start = train(spec | {"training": {"max_steps": 1, "learning_rate": 1e-12}}, tmp_path / "start", quiet=True).path
    before = load_file(start / "adapter_model.safetensors")
    for name, value in load_file(moved).items():
        if "module_logits" in name:
            change = (value - before[name]).abs().amax(dim=1)
            assert change[0] > 0
            assert change[1] > 0
            assert change[2] == 0
    spec["adapter"] = adapter | {"n_tasks": 1}
    with pytest.raises(SpecError, match=r"adapter\.n_tasks: expected 2, the number of tasks in data\.train"):
        train(spec, tmp_path / "bad", quiet=True)
    spec["adapter"], spec["data"] = adapter, {"train": str(data / "a.jsonl")}
    with pytest.raises(SpecError, match=r"data\.train\[0\]\.task: required: poly learns 3 tasks"):
        train(spec, tmp_path / "bad", quiet=True)


def test_first_batch_logged_is_that_of_the_order(base, data, tmp_path):
    """The loss of the first step is that of the rows which the seed puts into the first batch, by hand."""
    from toolkit.data.batches import batch_order
    from toolkit.embedded.tokenizer import build_tokenizer

    spec = spec_of(base, data, max_steps=1, seed=5)
    folder = train(spec, tmp_path / "out", quiet=True).path
    tokenizer = build_tokenizer(64)
    rows = [json.loads(line) for line in (data / "a.jsonl").read_text().splitlines()]
    asked = [tokenizer.encode(row["prompt"]) for row in rows]
    ids = [a + tokenizer.encode(row["completion"]) + [257] for a, row in zip(asked, rows, strict=True)]
    order = batch_order([len(i) for i in ids], 4, seed=5, epoch=0, by_length=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    total, count = 0.0, 0
    for index in order[:4]:
        with torch.inference_mode():
            logs = torch.log_softmax(model(torch.tensor([ids[index]])).logits[0], dim=-1)
        for position in range(len(asked[index]), len(ids[index])):
            total -= logs[position - 1, ids[index][position]].item()
            count += 1
    logged = json.loads((folder / METRICS).read_text().splitlines()[0])["loss"]
    assert logged == pytest.approx(total / count, rel=1e-4)
