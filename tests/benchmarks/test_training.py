"""What training costs, measured on small things whose numbers are known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks.training import __main__ as command
from benchmarks.training import longest, memory, nf4, ours, plain
from benchmarks.training.speed import gain_allowed
from benchmarks.training.work import word_tokenizer, write_even_rows, write_model
from toolkit.models.load import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", "tiny")


def test_gain_that_lengths_allow_is_the_mean_over_all_batches():
    lengths = [1, 2, 4, 9]
    pairings = [[(0, i), tuple({1, 2, 3} - {i})] for i in (1, 2, 3)]
    padded = [sum(2 * max(lengths[a], lengths[b]) for a, b in pairs) for pairs in pairings]
    share = sum(1 - sum(lengths) / total for total in padded) / 3
    assert gain_allowed(lengths, 2, draws=4000) == pytest.approx(1 / (1 - share), rel=0.01)
    assert gain_allowed([5] * 8, 4) == 1


def test_both_sides_of_the_speed_train_the_same(base, tmp_path):
    """On one row over and over both see the same tokens; a LoRA starts at nothing, so the first loss is the model's."""
    data = write_even_rows(tmp_path / "rows.jsonl", 1, 32)
    options = {"base": str(base), "data": data, "batch_size": 1, "steps": 1}
    found = [side(options | {"out": str(tmp_path / side.__module__)}) for side in (plain.train, ours.run)]
    assert [run["tokens"] for run in found] == [32, 32]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)


def test_four_bits_compute_what_the_codes_stand_for():
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 96, bias=False)
    held = nf4.Nf4Linear(linear)
    assert not list(held.parameters())
    x = torch.randn(3, 128, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    held(x).square().sum().backward()
    (again @ held.weight.T).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    assert (held.weight - linear.weight).abs().max() < 0.2 * linear.weight.abs().max()
    assert sum(t.nbytes for t in held.buffers()) == 128 * 96 // 2 + 2 * 128 * 96 // 64


def test_parts_of_the_memory(base, tmp_path):
    data = write_even_rows(tmp_path / "rows.jsonl", 2, 40)
    total = sum(value.nbytes for value in load_model(str(base)).model.parameters())
    found = {way: memory.measure({"way": way, "base": str(base), "data": str(data)}) for way in ("full", "LoRA")}
    assert found["full"]["gradients"] == total
    assert 2 * total <= found["full"]["optimizer"] < 2 * total + 1000
    assert found["LoRA"]["gradients"] < 0.5 * total
    assert found["LoRA"]["weights"] >= total


def test_longest_row_under_a_cap(base, monkeypatch):
    monkeypatch.setattr(longest, "CHUNK", 64)
    monkeypatch.setattr(longest, "LOGITS_CHUNK", 32)
    model: Any = load_model(str(base)).model.train()
    peaks = {way: longest._peak(model, way, 512) for way in longest.WAYS}
    assert peaks["streambp"] < peaks["gradient checkpointing"] < peaks["plain"]
    assert longest._longest(lambda tokens: tokens, 1000, 1 << 14) == 1000 // 128 * 128
    assert longest._longest(lambda tokens: 0, 1000, 1 << 14) == 1 << 14


def test_tokens_are_words(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "two two apples", "completion": "two"}) + "\n")
    tokenizer = word_tokenizer([tmp_path / "rows.jsonl"], size=1)
    assert tokenizer("two pears")["input_ids"] == [4, 0]


def test_mistakes(tmp_path, capsys):
    assert command.main(["packing", "--data", str(tmp_path), "--work", str(tmp_path)]) == 1
    assert "gsm8k_train.jsonl: no such file; --data names a folder" in capsys.readouterr().err
