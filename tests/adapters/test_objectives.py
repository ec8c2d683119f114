"""Losses of preferences, classes and embeddings are their formulas, computed apart from what stock PEFT reloads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import toolkit
from toolkit.adapters.plan import plan_training, preview
from toolkit.adapters.runs import METRICS
from toolkit.adapters.train import train
from toolkit.data.rows import write_rows
from toolkit.errors import DataError, SpecError


def spec_of(base, objective, rows: Path, adapter: dict | None = None, **training) -> dict:
    settings = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 1} | training
    return {
        "base": str(base),
        "objective": objective,
        "adapter": adapter or {"method": "lora", "r": 4},
        "data": {"train": str(rows), "validation": str(rows)},
        "training": settings,
        "device": "cpu",
    }


def logged(folder: Path, key: str = "loss") -> list[float]:
    return [e[key] for e in map(json.loads, (folder / METRICS).read_text().splitlines()) if key in e]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_rows(
        path, [{"prompt": f"{i}: ", "chosen": "y" * (1 + i % 4), "rejected": "no" * (1 + i % 3)} for i in range(9)]
    )
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    write_rows(
        path, [{"text": "abc" * (1 + i % 5) + str(i), "label": ("odd", "even", "big")[i % 3]} for i in range(17)]
    )
    return path


@pytest.fixture(scope="module")
def passages(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("passages") / "rows.jsonl"
    rows = [{"query": f"what is {i}?", "positive": f"it is {i % 7}"} for i in range(10)]
    write_rows(path, [row | ({"negative": "nothing" + "!" * i} if i % 2 else {}) for i, row in enumerate(rows)])
    return path


def log_probability(model, asked: list[int], answer: list[int]) -> float:
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([asked + answer])).logits[0].double(), dim=-1)
    return sum(logs[len(asked) + i - 1, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_preference_loss_is_that_of_two_models(smoothing, base, pairs, tmp_path):
    objective = {"method": "dpo", "beta": 0.3, "label_smoothing": smoothing}
    result = train(spec_of(base, objective, pairs), tmp_path / "out", quiet=True)
    assert logged(result.path)[0] == pytest.approx(math.log(2), rel=1e-6), "at the start the adapter is the base"
    plain = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(result.path))
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses, margins = [], []
    for row in read(pairs):
        asked = tokenizer.encode(row["prompt"])
        gains = {}
        for name in ("chosen", "rejected"):
            answer = [*tokenizer.encode(row[name]), tokenizer.eos_token_id]
            gains[name] = log_probability(tuned, asked, answer) - log_probability(plain, asked, answer)
        margin = 0.3 * (gains["chosen"] - gains["rejected"])
        wrong = math.log1p(math.exp(margin))  # -log sigmoid(-margin)
        losses.append((1 - smoothing) * math.log1p(math.exp(-margin)) + smoothing * wrong)
        margins.append(margin)
    assert result.numbers["eval_loss"] == pytest.approx(sum(losses) / 9, rel=1e-4)
    assert result.numbers["eval_margin"] == pytest.approx(sum(margins) / 9, rel=1e-4)
    assert result.numbers["eval_accuracy"] == sum(m > 0 for m in margins) / 9


def test_preferences_in_chats_are_those_of_their_last_answers(base, tmp_path):
    """What both chats begin with cancels, so that adding earlier turns to both sides changes no gradient's meaning."""
    asked = [{"role": "user", "content": "Hi?"}]
    row = {"prompt": asked, "chosen": [{"role": "assistant", "content": "Yes."}]}
    write_rows(tmp_path / "rows.jsonl", [row | {"rejected": [{"role": "assistant", "content": "No!"}]}] * 4)
    spec = spec_of(base, "dpo", tmp_path / "rows.jsonl")
    losses = logged(train(spec, tmp_path / "out", quiet=True).path)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses[-1] < 0.8 * losses[0]
    first, second = preview(spec, 1).numbers["rows"]
    assert next(piece for piece, trained in first["pieces"] if trained).startswith("Yes.")
    assert next(piece for piece, trained in second["pieces"] if trained).startswith("No!")


@pytest.mark.parametrize("objective", ["dpo", "classification"])
def test_steps_do_not_depend_on_how_rows_are_batched(objective, base, pairs, labelled, tmp_path):
    rows = pairs if objective == "dpo" else labelled
    whole, parts = (
        train(spec_of(base, objective, rows, max_steps=3, **sizes), tmp_path / str(i), quiet=True).path
        for i, sizes in enumerate(({"batch_size": 20}, {"batch_size": 3, "gradient_accumulation_steps": 6}))
    )
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_preferences_need_a_base_beside_the_model(base, pairs, tmp_path):
    with pytest.raises(SpecError, match="objective: dpo compares with the base, which full training changes"):
        train(spec_of(base, "dpo", pairs, {"method": "full"}), tmp_path / "out", quiet=True)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_classifier_is_what_stock_peft_loads(precision, base, labelled, tmp_path):
    spec = spec_of(base, "classification", labelled, max_steps=12, precision=precision)
    result = train(spec, tmp_path / "out", quiet=True)
    labels = result.numbers["labels"]
    assert labels == ["big", "even", "odd"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    own = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=tokenizer.pad_token_id)
    model = PeftModel.from_pretrained(own, str(result.path))
    losses, right = [], 0
    for row in read(labelled):
        with torch.inference_mode():
            logits = model(torch.tensor([tokenizer.encode(row["text"])])).logits[0].double()
        losses.append(-torch.log_softmax(logits, 0)[labels.index(row["label"])].item())
        right += labels[int(logits.argmax())] == row["label"]
    loose = precision == "bfloat16"
    assert result.numbers["eval_loss"] == pytest.approx(sum(losses) / 17, rel=0.05 if loose else 1e-4)
    assert result.numbers["eval_accuracy"] == pytest.approx(right / 17, abs=0.13 if loose else 1e-9)
    seen = logged(result.path)
    assert seen[-1] < seen[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": "eevn"}, r"bad\.jsonl:2: unknown label 'eevn'; did you mean 'even'\?"),
        ({"text": "x", "label": float("nan")}, r"bad\.jsonl:2: the label must be a text or a whole number, got nan"),
        ({"text": "x", "label": None}, r"bad\.jsonl:2: the label must be a text or a whole number, got None"),
        ({"text": "x", "lable": "odd"}, r"bad\.jsonl:2: .*no field 'label'; did you mean 'lable'\?"),
        ({"txt": "x", "label": "odd"}, r"bad\.jsonl:2: text must be a text, got txt, label"),
        ({"text": "", "label": "odd"}, r"bad\.jsonl:2: has no tokens; set data\.empty"),
    ],
)
def test_rows_that_are_no_class_are_named(row, message, base, labelled, tmp_path):
    write_rows(tmp_path / "bad.jsonl", [{"text": "x", "label": "odd"}, row])
    spec = spec_of(base, "classification", labelled)
    spec["data"]["validation"] = str(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=message):
        train(spec, tmp_path / "out", quiet=True)


def test_labels_come_from_the_spec_or_the_data(base, labelled, tmp_path):
    write_rows(tmp_path / "one.jsonl", [{"text": "x", "label": 1}] * 3)
    with pytest.raises(DataError, match=r"one\.jsonl: every row has the label '1'; a classifier needs at least two"):
        train(spec_of(base, "classification", tmp_path / "one.jsonl"), tmp_path / "out", quiet=True)
    objective = {"method": "classification", "labels": ["odd", "even", "small"]}
    with pytest.raises(DataError, match="unknown label 'big'"):
        train(spec_of(base, objective, labelled), tmp_path / "out", quiet=True)
    objective["labels"] = ["odd", "even", "big", "never"]
    result = train(spec_of(base, objective, labelled, max_steps=1), tmp_path / "out", quiet=True)
    weight = load_file(result.path / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert (result.numbers["labels"], weight.shape[0]) == (objective["labels"], 4)


def test_model_in_memory_is_given_back_without_the_head(base, labelled, tmp_path):
    loaded = toolkit.load_model(base)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    spec = spec_of(base, "classification", labelled) | {"base": (loaded.model, loaded.tokenizer)}
    train(spec, tmp_path / "out", quiet=True)
    after = loaded.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.requires_grad for value in loaded.model.parameters())


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_contrastive_loss_is_its_formula(pooling, base, passages, tmp_path):
    objective = {"method": "embedding", "pooling": pooling, "temperature": 0.2}
    result = train(spec_of(base, objective, passages, batch_size=10), tmp_path / "out", quiet=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(result.path))
    tokenizer = AutoTokenizer.from_pretrained(base)

    def embed(text: str) -> torch.Tensor:
        with torch.inference_mode():
            states = model(torch.tensor([tokenizer.encode(text)]), output_hidden_states=True).hidden_states[-1][0]
        vector = (states[-1] if pooling == "last" else states.mean(0)).double()
        return vector / vector.norm()

    rows = read(passages)
    others = [embed(row["negative"]) for row in rows if "negative" in row]
    losses, right = [], 0
    for row in rows:
        own = (embed(row["query"]) @ embed(row["positive"]) / 0.2).item()
        wrong = [embed(other["positive"]) for other in rows if other["positive"] != row["positive"]] + others
        scores = torch.tensor([own, *((embed(row["query"]) @ vector / 0.2).item() for vector in wrong)]).double()
        losses.append((torch.logsumexp(scores, 0) - own).item())
        right += int(scores.argmax()) == 0
    assert result.numbers["eval_loss"] == pytest.approx(sum(losses) / 10, rel=1e-4)
    assert result.numbers["eval_accuracy"] == right / 10
    seen = logged(result.path)
    assert seen[-1] < seen[0]


@pytest.mark.parametrize(
    ("objective", "row", "message"),
    [
        ("dpo", {"prompt": "x", "chosen": "y"}, "expected prompt, chosen and rejected, all texts or all lists"),
        ("embedding", {"query": "x"}, "positive must be a text, got query"),
        ("embedding", {"query": "x", "positive": 3}, "positive must be a text, got 3"),
    ],
)
def test_rows_of_another_form_are_named(objective, row, message, base, tmp_path):
    write_rows(tmp_path / "bad.jsonl", [row])
    with pytest.raises(DataError, match=rf"bad\.jsonl:1: {message}"):
        train(spec_of(base, objective, tmp_path / "bad.jsonl"), tmp_path / "out", quiet=True)


def test_unknown_objectives_and_parameters(base, pairs):
    for objective, message in (
        ("dop", "objective.method: unknown objective 'dop'; did you mean 'dpo'?"),
        ({"method": "dpo", "bta": 1}, "objective.bta: unknown key 'bta'; did you mean 'beta'?"),
        ({"method": "dpo", "beta": 0}, "objective.beta: Input should be greater than 0"),
    ):
        with pytest.raises(SpecError) as caught:
            plan_training(spec_of(base, objective, pairs))
        assert message in str(caught.value)
    spec = spec_of(base, "dpo", pairs)
    spec["data"]["packing"] = True
    with pytest.raises(SpecError, match=r"data\.packing: dpo learns from single rows; set it to false"):
        plan_training(spec)
    assert plan_training(spec_of(base, "dpo", pairs)).numbers["memory"]["activations"] is None
