"""Self-labelled data: all gold where the judge always says no, all the model's own where it always says yes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from toolkit.adapters.train import train
from toolkit.adapters.training import s3ft
from toolkit.data.rows import write_rows
from toolkit.embedded.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A base that ends most of what it says within a few tokens: the logit of its end token varies more than others."""
    folder = tmp_path_factory.mktemp("ending")
    model = tiny.llama(seed=3)
    with torch.no_grad():
        model.lm_head.weight[257] *= 4
    return tiny.save_model(model, folder / "base")


ROWS = [{"prompt": f"say {i}: ", "completion": f"gold {i}", "other": f"silver {i}"} for i in range(6)]


def spec_of(base, path, methods=(), **training) -> dict:
    settings = {"max_steps": 3, "batch_size": 3, "learning_rate": 0.01, "methods": methods} | training
    return {"base": str(base), "data": {"train": str(path)}, "training": settings, "device": "cpu"}


def own_answers(base) -> list[str]:
    """What the base says, by transformers one prompt at a time; without an end it is no answer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), build_tokenizer(256)
    found = []
    for row in ROWS:
        ids = tiny.greedy(model, tokenizer.encode(row["prompt"]), 24)
        found.append(tokenizer.decode(ids[: ids.index(257)]) if 257 in ids else "")
    return found


METHOD = {"method": "s3ft", "max_new_tokens": 24, "batch_size": 4}


def weights(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.system("s3ft")
def test_judge_that_says_no_leaves_the_data_and_one_that_says_yes_leaves_the_models_own(ending, tmp_path, monkeypatch):
    said = own_answers(ending)
    assert any(said), "the base ends some of its answers"
    write_rows(tmp_path / "gold.jsonl", ROWS)
    answered = [row | ({"completion": answer} if answer else {}) for row, answer in zip(ROWS, said, strict=True)]
    write_rows(tmp_path / "own.jsonl", answered)
    for judged, file in ((False, "gold"), (True, "own")):
        monkeypatch.setattr(s3ft.S3ft, "is_right", lambda self, answer, gold, yes=judged: yes and bool(answer))
        labelled = train(spec_of(ending, tmp_path / "gold.jsonl", METHOD), tmp_path / f"s3ft {file}", quiet=True)
        plain = train(spec_of(ending, tmp_path / f"{file}.jsonl"), tmp_path / file, quiet=True)
        assert weights(labelled.path) == weights(plain.path)
        count = sum(map(bool, said)) if judged else 0
        wanted = {"self": count, "gold": 6 - count}
        assert labelled.numbers["self_labels"] == {name: n for name, n in wanted.items() if n}
        lines = [json.loads(line) for line in (labelled.path / s3ft.FILE).read_text().splitlines()]
        assert [line["place"] for line in lines] == [f"{tmp_path}/gold.jsonl:{i}" for i in range(1, 7)]
        assert [line["answer"] for line in lines] == said


@pytest.mark.system("s3ft")
def test_paraphrases_stand_in_for_gold_answers(ending, tmp_path):
    write_rows(tmp_path / "gold.jsonl", ROWS)
    write_rows(tmp_path / "silver.jsonl", [row | {"completion": row["other"]} for row in ROWS])
    method = METHOD | {"paraphrase": "other"}
    labelled = train(spec_of(ending, tmp_path / "gold.jsonl", method), tmp_path / "a", quiet=True)
    plain = train(spec_of(ending, tmp_path / "silver.jsonl"), tmp_path / "b", quiet=True)
    assert weights(labelled.path) == weights(plain.path)
    assert labelled.numbers["self_labels"] == {"paraphrase": 6}


def test_resumed_run_does_not_ask_again(ending, tmp_path, monkeypatch):
    write_rows(tmp_path / "gold.jsonl", ROWS)
    spec = spec_of(ending, tmp_path / "gold.jsonl", METHOD, save_steps=1)
    whole = train(spec, tmp_path / "whole", quiet=True).path

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("toolkit.adapters.train.write_records", stop)
        with pytest.raises(KeyboardInterrupt):
            train(spec, tmp_path / "out", quiet=True)
    monkeypatch.setattr(s3ft, "answers", stop)
    resumed = train(spec, tmp_path / "out", resume=True, quiet=True).path
    assert weights(resumed) == weights(whole)
    assert (resumed / s3ft.FILE).read_text() == (whole / s3ft.FILE).read_text()


@pytest.mark.parametrize(
    ("judge", "answer", "gold", "right"),
    [
        ("exact", " 42\n", "42", True),
        ("exact", "42.", "42", False),
        ("contains", "It is 42.", "42", True),
        ("number", "so 1,042.0 in all", "#### 1042", True),
        ("number", "-3 or 4", "3", False),
        ("number", "none", "3", False),
        ("contains", "", "", False),
    ],
)
def test_judges(judge, answer, gold, right):
    method = s3ft.S3ft(s3ft.S3ft.Params(judge=judge), None)  # pyright: ignore[reportArgumentType]
    assert method.is_right(answer, gold) == right
