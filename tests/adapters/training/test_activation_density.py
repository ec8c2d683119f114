"""The penalty tends to the share of active neurons, is the same however a step is cut, and makes them fewer."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from tests import tiny
from toolkit.adapters.train import train
from toolkit.adapters.training._tokens import real
from toolkit.adapters.training.activation_density import penalty
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError


@pytest.mark.system("deft")
def test_penalty_tends_to_the_share_that_is_not_zero():
    torch.manual_seed(0)
    layers = [torch.randn(50, 40, dtype=torch.float64).relu(), (torch.randn(50, 40) - 0.5).relu()]
    share = sum(float((a != 0).double().mean()) for a in layers) / 2
    values = [float(penalty(layers, eps)) for eps in (1.0, 1e-2, 1e-6, 1e-12)]
    assert values == sorted(values)
    assert all(0 <= v <= share for v in values)
    assert values[-1] == pytest.approx(share, abs=1e-4)
    assert values[0] < 0.7 * share
    a = layers[0]
    assert float(penalty([a], 0.3)) == pytest.approx(float((a**2 / (a**2 + 0.3)).mean()), rel=1e-6)
    zero = torch.zeros(3, requires_grad=True)
    penalty([zero], 1e-7).backward()
    assert zero.grad is not None
    assert torch.equal(zero.grad, torch.zeros(3)), "where nothing is active nothing is pushed"


def test_padding_and_what_comes_after_the_last_trained_token_do_not_count():
    labels = torch.tensor([[-100, 3, -100, 4, -100], [1, -100, -100, -100, -100]])
    assert real({"labels": labels}).tolist() == [[True] * 4 + [False], [True] + [False] * 4]


@pytest.fixture(scope="module")
def relu_base(tmp_path_factory):
    torch.manual_seed(0)
    return tiny.save_model(LlamaForCausalLM(tiny.llama_config(hidden_act="relu")), tmp_path_factory.mktemp("relu"))


def spec_of(base, tmp_path, methods, **training) -> dict:
    rows = [{"prompt": f"{i} ", "completion": "abc" * (1 + i % 3)} for i in range(16)]
    write_rows(tmp_path / "a.jsonl", rows)
    settings = {"max_steps": 4, "batch_size": 8, "learning_rate": 0.01, "logging_steps": 1, "methods": methods}
    data = {"train": str(tmp_path / "a.jsonl"), "batches": "random"}
    return {"base": str(base), "data": data, "training": settings | training, "device": "cpu"}


def entries(folder) -> list[dict]:
    return [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "grad_norm" in e]


@pytest.mark.system("deft")
def test_weight_zero_is_a_plain_run_and_a_step_does_not_depend_on_its_cuts(relu_base, tmp_path):
    density = {"method": "activation_density", "weight": 3.0}
    specs = [
        spec_of(relu_base, tmp_path, ()),
        spec_of(relu_base, tmp_path, density | {"weight": 0}),
        spec_of(relu_base, tmp_path, density),
        spec_of(relu_base, tmp_path, density, batch_size=2, gradient_accumulation_steps=4),
    ]
    runs = [train(spec, tmp_path / str(i), quiet=True).path for i, spec in enumerate(specs)]
    files = [(run / "adapter_model.safetensors").read_bytes() for run in runs]
    assert files[0] == files[1] != files[2]
    whole, cut = (torch.tensor([(e["loss"], e["grad_norm"]) for e in entries(run)]) for run in runs[2:])
    torch.testing.assert_close(cut[0], whole[0], rtol=1e-4, atol=1e-5)


@pytest.mark.system("deft")
def test_density_falls_and_the_task_is_learned(relu_base, tmp_path):
    found = []
    for weight in (0.0, 5.0):
        method = {"method": "activation_density", "weight": weight, "threshold": 0.0}
        spec = spec_of(relu_base, tmp_path, method, max_steps=60, learning_rate=0.02)
        spec["data"]["validation"] = spec["data"]["train"]
        spec["adapter"] = {"method": "lora", "r": 8}
        found.append(train(spec, tmp_path / str(weight), quiet=True).numbers)
    plain, sparse = found
    assert sparse["activation_density"]["first"] == pytest.approx(plain["activation_density"]["first"])
    assert sparse["activation_density"]["last"] < 0.7 * plain["activation_density"]["last"]
    assert sparse["eval_loss"] < plain["eval_loss"] + 0.3


def test_partial_passes_are_refused(relu_base, tmp_path):
    with pytest.raises(SpecError, match="streambp runs a batch in parts"):
        train(spec_of(relu_base, tmp_path, ["activation_density", "streambp"]), tmp_path / "out", quiet=True)
