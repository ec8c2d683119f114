"""Adapters that train in the same batches take the steps of their own runs."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import toolkit
from toolkit.adapters.together import train_together
from toolkit.adapters.train import train
from toolkit.cli import main
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError


@pytest.fixture
def three(base, tmp_path) -> list[dict]:
    """Runs that differ in all they may: rank, modules, data, packing, batches, optimizer, schedule, length."""
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"a {i} ", "completion": str(i % 7) * (1 + i % 9)} for i in range(29)])
    write_rows(tmp_path / "b.jsonl", [{"prompt": f"b {i} ", "completion": "xyz"} for i in range(17)])

    def spec(name, file, adapter, data=(), **training) -> dict:
        settings = {"num_epochs": 3, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1} | training
        sources = {"train": str(tmp_path / file), "validation": str(tmp_path / file)} | dict(data)
        made = {"base": str(base), "device": "cpu", "out": str(tmp_path / name)}
        return made | {"adapter": {"method": "lora"} | adapter, "data": sources, "training": settings}

    return [
        spec("one", "a.jsonl", {"r": 4}, seed=1, gradient_accumulation_steps=2, warmup_steps=2),
        spec("two", "b.jsonl", {"r": 2, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
             {"packing": True, "max_length": 60}, seed=2, lr_scheduler="cosine", weight_decay=0.1),
        spec("three", "b.jsonl", {"r": 3, "lora_alpha": 30}, {"batches": "random"}, seed=3, max_grad_norm=0.3,
             max_steps=7, optimizer="adafactor"),
    ]  # fmt: skip


def logged(folder) -> list[tuple[float, float, float]]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(e["loss"], e["grad_norm"], e["learning_rate"]) for e in entries if "loss" in e]


def test_each_trajectory_is_that_of_its_own_run(three, tmp_path):
    results = train_together(three, quiet=True)
    for spec, together in zip(three, results, strict=True):
        alone = train(spec, tmp_path / "alone", overwrite=True, quiet=True)
        for a, b in zip(logged(together.path), logged(alone.path), strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        mine, own = (load_file(r.path / "adapter_model.safetensors") for r in (together, alone))
        assert list(mine) == list(own)
        for name in own:
            torch.testing.assert_close(mine[name], own[name], rtol=1e-3, atol=2e-5)
        same = ("steps", "trainable_parameters", "parameters", "data")
        assert {k: together.numbers[k] for k in same} == {k: alone.numbers[k] for k in same}
        assert together.numbers["eval_loss"] == pytest.approx(alone.numbers["eval_loss"], rel=1e-4)
        assert {p.name for p in alone.path.iterdir()} - {p.name for p in together.path.iterdir()} == {"tensorboard"}
        config = [json.loads((r.path / "adapter_config.json").read_text()) for r in (together, alone)]
        assert {**config[0], "target_modules": 0} == {**config[1], "target_modules": 0}


def test_base_in_memory_is_given_back(three, base):
    loaded = toolkit.load_model(base)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    pair = (loaded.model, loaded.tokenizer)
    train_together([spec | {"base": pair} for spec in three[:2]], quiet=True)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training


def test_command_line(three, tmp_path, capsys):
    paths = [tmp_path / f"{i}.yaml" for i in range(2)]
    for path, spec in zip(paths, three, strict=False):
        path.write_text(yaml.safe_dump(spec))
    assert (
        main(["train", str(paths[0]), "--with", str(paths[1]), "--json", "--quiet", "--set", "training.max_steps=1"])
        == 0
    )
    assert [one["steps"] for one in json.loads(capsys.readouterr().out)] == [1, 1]
    assert main(["train", str(paths[0]), "--with", str(paths[1]), "--resume"]) == 2
    assert "--with trains to the end" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"method": "ia3"}}, "adapter: plain LoRAs train together; ia3 does not"),
        ({"adapter": {"use_dora": True}}, "adapter: plain LoRAs train together; use_dora does not"),
        ({"adapter": {"lora_dropout": 0.1}}, "adapter.lora_dropout: would draw other numbers"),
        ({"training": {"save_steps": 3}}, "training.save_steps: is for runs of one adapter"),
        ({"base": "other"}, "base: adapters that train together share it"),
        ({"out": None}, "out: required, and different for every adapter"),
        ({"objective": "dpo"}, "adapters that train together learn completions"),
    ],
)
def test_what_cannot_be_done_beside_others(change, message, three, tmp_path):
    with pytest.raises(SpecError) as caught:
        train_together([three[0], three[1] | change], quiet=True)
    assert message in str(caught.value)
    assert not (tmp_path / "one").exists()
