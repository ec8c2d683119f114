"""Two processes train what one with twice the batch does, by data parallelism and with the model in shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.train import train
from toolkit.adapters.trainer import training_arguments
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError

LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
"""accelerate starts several processes under this name on machines without a GPU, too; the spec puts them on the CPU."""


def launched(path: Path) -> None:
    """Run a spec as users do, on two processes."""
    words = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split(), "-m", "toolkit", "train", str(path)]
    run = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("trainable parameters") == 1, "one process tells"


def losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [e[key] for e in entries for key in ("loss", "eval_loss") if key in e]


@pytest.fixture
def spec(base, tmp_path) -> dict:
    """29 rows, so that the last batch of an epoch is uneven, and one process of two has a row less."""
    rows = [
        {"prompt": f"{task} {i} ", "completion": str(i % 7) * (i % 5 + 1)}
        for i in range(29)
        for task in "ab"[: 1 + i % 2]
    ]
    for task in "ab":
        write_rows(tmp_path / f"{task}.jsonl", [row for row in rows if row["prompt"].startswith(task)])
    sources = [{"path": str(tmp_path / f"{task}.jsonl"), "task": task} for task in "ab"]
    training = {"num_epochs": 2, "learning_rate": 0.01, "logging_steps": 1, "gradient_accumulation_steps": 2}
    data = {"train": sources, "validation": sources}
    return {"base": str(base), "adapter": {"r": 4}, "data": data, "training": training, "device": "cpu"}


def compare(spec: dict, tmp_path: Path, single: dict, several: dict) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec | {"training": spec["training"] | several, "out": str(tmp_path / "two")}))
    launched(path)
    alone = train(spec | {"training": spec["training"] | single}, tmp_path / "one", quiet=True).path
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=1e-4)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (alone, tmp_path / "two"))
    assert list(one) == list(two)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "methods",
    [(), pytest.param(({"method": "mftcoder", "balance": "task_samples"},), marks=pytest.mark.slow)],
    ids=["plain", "mftcoder"],
)
def test_losses_are_those_of_one_process_with_twice_the_batch(methods, spec, tmp_path):
    methods = list(methods)
    compare(spec, tmp_path, {"batch_size": 8, "methods": methods}, {"batch_size": 4, "methods": methods})


@pytest.mark.slow
def test_model_in_shards_trains_the_same(spec, tmp_path):
    shards = {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    compare(spec, tmp_path, {"batch_size": 8}, {"batch_size": 4, **shards})


def test_settings_of_fsdp_pass_through_and_deepspeed_must_be_there(spec, tmp_path):
    config = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_offload": True}
    training = spec["training"] | {"fsdp": True, "fsdp_config": config}
    found = training_arguments(TrainSpec(**spec | {"training": training}), tmp_path, evaluate=False)
    assert found.fsdp
    assert {key: found.fsdp_config[key] for key in config} == config
    with pytest.raises(SpecError, match=r"training\.deepspeed: deepspeed is not installed"):
        train(spec | {"training": {"deepspeed": {"zero_optimization": {"stage": 3}}}}, tmp_path / "out", quiet=True)
