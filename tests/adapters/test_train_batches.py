"""Rows reach a step once, in memory or as a stream, however they are put into batches and dealt out to processes."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from toolkit.adapters.callbacks import ShowProgress
from toolkit.adapters.loader import Order, Rows, Steps, dealt
from toolkit.adapters.plan import plan_training
from toolkit.adapters.runs import METRICS
from toolkit.adapters.train import train
from toolkit.data.groups import Group, num_tokens, num_trained
from toolkit.data.pack import Packed
from toolkit.data.rows import write_rows
from toolkit.errors import DataError, SpecError


def packed(length: int, key: int = 0) -> Packed:
    return Packed([key] * length, [-100, *[key] * (length - 1)], list(range(length)))


def processes_of(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


@pytest.mark.parametrize("options", [{}, {"by_length": True}, {"budget": 60}, {"tasks": [i % 3 for i in range(23)]}])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one_process(world, options, monkeypatch):
    lengths = [3 + i * 7 % 11 for i in range(23)]
    parts = []
    for rank in range(world):
        processes_of(monkeypatch, rank, world)
        parts.append(list(Order(lengths, 2, seed=4, **options)))
        assert len(Order(lengths, 2, seed=4, **options)) == len(parts[-1])
    processes_of(monkeypatch, 0, 1)
    if "budget" not in options:  # a budget is one process's, so that a step of several is another one
        alone = list(Order(lengths, 2 * world, seed=4, **options))
        for step, batch in enumerate(alone):
            together = [row for part in parts for row in part[step] if row >= 0]
            assert sorted(together) == sorted(batch)
    assert sorted(row for part in parts for batch in part for row in batch if row >= 0) == list(range(23))
    assert all(len({len(part[step]) for part in parts}) == 1 for step in range(len(parts[0]))), "none waits in vain"


def test_rows_that_fill_a_batch_train_nothing():
    assert dealt([5, 6, 7], 1, 2) == [6, ~5]
    rows = Rows([packed(4, 9), packed(3, 8)])
    assert rows[~0].tokens == [9] * 4
    assert set(rows[~0].labels) == {-100}
    group = Group((packed(4), packed(2), packed(3)), label=2)
    (filling,) = [Rows([group])[~0]]
    assert filling.label == -100
    assert len(filling.texts) == 2
    assert (num_tokens(group), num_trained(group), num_trained(filling)) == (9, 6, 0)


def stream(count: int, size: int, **options) -> Steps:
    def items():
        yield from (packed(2 + i * 5 % 7, i % count) for i in itertools.count())

    settings = {"seed": 1, "by_length": True, "buffer": 13, "pack": lambda rows: rows} | options
    return Steps(items, size, **settings)


def test_stream_gives_every_row_as_often_and_processes_share_its_batches(monkeypatch):
    batches = list(itertools.islice(stream(12, 4), 30))
    assert all(len(batch) == 4 for batch in batches)
    seen = Counter(row.tokens[0] for batch in batches for row in batch)
    assert max(seen.values()) - min(seen.values()) <= 2  # 120 rows of 12, a buffer of which is still to come
    assert [b for b, _ in zip(stream(12, 4), range(30), strict=False)] == batches, "the seed decides"
    parts = []
    for rank in range(2):
        processes_of(monkeypatch, rank, 2)
        parts.append(list(itertools.islice(stream(12, 2), 30)))
    for a, b, whole in zip(*parts, batches, strict=True):
        assert sorted(r.tokens for r in a + b) == sorted(r.tokens for r in whole)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, [{"prompt": f"{i} ", "completion": "yz" * (1 + i * 7 % 9)} for i in range(30)])
    return path


def spec_of(base, path, data: dict | None = None, **training) -> dict:
    settings = {"max_steps": 6, "batch_size": 5, "learning_rate": 1e-2, "logging_steps": 1} | training
    data = {"train": str(path)} | (data or {})
    return {"base": str(base), "adapter": {"r": 2}, "data": data, "training": settings, "device": "cpu"}


@pytest.mark.system("length_bucketing")
def test_loss_of_a_step_does_not_depend_on_the_batches(base, rows, tmp_path):
    """All thirty rows in one step: as one batch, by length, in any order, or by tokens."""
    found = []
    for i, (data, training) in enumerate(
        [
            ({}, {"batch_size": 30}),
            ({"batches": "by_length"}, {"gradient_accumulation_steps": 6}),
            ({"batches": "random"}, {"gradient_accumulation_steps": 6}),
            ({}, {"batch_tokens": 60, "gradient_accumulation_steps": 100}),
        ]
    ):
        result = train(spec_of(base, rows, data, max_steps=2, **training), tmp_path / str(i), quiet=True)
        found.append(load_file(result.path / "adapter_model.safetensors"))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def stop_at(monkeypatch, step: int) -> None:
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShowProgress, "on_step_end", on_step_end)


@pytest.mark.system("length_bucketing")
@pytest.mark.parametrize(
    ("data", "training"),
    [
        ({}, {"batch_tokens": 70, "max_steps": 14}),
        ({"streaming": True, "buffer": 11}, {"max_steps": 14}),
        ({"streaming": True, "buffer": 11, "packing": True, "max_length": 60}, {"gradient_accumulation_steps": 2}),
    ],
)
def test_killed_runs_go_on_to_the_same_bytes(data, training, base, rows, tmp_path, monkeypatch):
    spec = spec_of(base, rows, data, save_steps=2, **training)
    whole = train(spec, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            train(spec, tmp_path / "out", quiet=True)
    resumed = train(spec, tmp_path / "out", resume=True, quiet=True)
    name = "adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert resumed.numbers["train_loss"] == whole.numbers["train_loss"]


def test_plan_knows_the_steps_of_batches_by_tokens(base, rows, tmp_path):
    spec = spec_of(base, rows, max_steps=None, num_epochs=2, batch_tokens=64)
    planned, done = plan_training(spec).numbers, train(spec, tmp_path / "out", quiet=True).numbers
    assert planned["steps"] == done["steps"]
    assert planned["data"] == done["data"]
    assert done["data"]["padding"] < 0.12
    with pytest.raises(SpecError, match=r"batch_tokens: expected at least the 22 tokens of the longest row, got 9"):
        train(spec_of(base, rows, batch_tokens=9), tmp_path / "short", quiet=True)


def test_streams_are_drawn_by_weight(base, rows, tmp_path, monkeypatch):
    from toolkit.adapters import loop

    write_rows(tmp_path / "other.jsonl", [{"text": "A" * 5}])
    seen = Counter()
    own = loop.AdapterTrainer._counted

    def counted(self, items):
        seen.update(item.tokens[0] == ord("A") for item in items)
        return own(self, items)

    monkeypatch.setattr(loop.AdapterTrainer, "_counted", counted)
    sources = [{"path": str(rows), "weight": 3}, {"path": str(tmp_path / "other.jsonl"), "weight": 1}]
    spec = spec_of(base, rows, {"train": sources, "streaming": True, "buffer": 50}, max_steps=40, batch_size=10)
    numbers = train(spec, tmp_path / "out", quiet=True).numbers
    assert numbers["data"]["streaming"]
    assert seen[True] / seen.total() == pytest.approx(0.25, abs=0.05)
    planned = plan_training(spec).numbers
    assert planned["steps"] == 40


def test_bad_row_of_a_stream_is_named_when_it_comes(base, rows, tmp_path):
    good = rows.read_text()
    (tmp_path / "bad.jsonl").write_text(good * 8 + '{"prompt": "x"}\n')
    spec = spec_of(base, tmp_path / "bad.jsonl", {"streaming": True, "buffer": 20}, max_steps=100, save_steps=2)
    with pytest.raises(DataError, match=r"bad\.jsonl:241: prompt and completion must both be text"):
        train(spec, tmp_path / "out", quiet=True)
    assert list((tmp_path / ".out.partial" / "checkpoints").iterdir()), "what was trained until then is kept"


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        ({"streaming": True}, {"max_steps": None}, "data.streaming needs training.max_steps; a stream has no end"),
        ({"streaming": True, "temperature": 2}, {}, "a stream has no size, so temperature and epoch_rows say nothing"),
        ({"streaming": True}, {"batch_tokens": 50}, "training.batch_tokens sorts all rows first"),
    ],
)
def test_streams_that_cannot_be(data, training, message, base, rows, tmp_path):
    with pytest.raises(SpecError, match=re.escape(message)):
        train(spec_of(base, rows, data, **training), tmp_path / "out", quiet=True)


def test_live_line_tells_loss_speed_memory_and_time(base, rows, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("toolkit.progress.Progress.note", lambda self, text: lines.append(text))
    train(spec_of(base, rows), tmp_path / "out")
    last = [e for e in map(json.loads, (tmp_path / "out" / METRICS).read_text().splitlines()) if "loss" in e][-1]
    found = re.fullmatch(r"loss (\S+)  (\S+) tokens/s  (\S+ [MG]B)  0s left", lines[-1])
    assert found
    assert float(found[1]) == pytest.approx(last["loss"], abs=1e-4)
    shown = ShowProgress("x", quiet=True)
    shown.seen.extend([(10.0, 4, 1000), (14.0, 6, 9000)])
    assert re.fullmatch(r"2.0k tokens/s  .*  3m08s left", shown.line(100))
