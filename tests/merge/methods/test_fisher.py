"""Fisher merging against its formula, and the Fisher information against autograd, example by example."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.merge.laws import Arrays, Example, Measured, run, settings
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.errors import SpecError
from toolkit.merge.method import load_method
from toolkit.merge.plan import make_plan
from toolkit.merge.run import merge
from toolkit.merge.spec import DataSpec
from toolkit.merge.statistics import fisher
from toolkit.merge.statistics.models import examples_of, tokenizer_of
from toolkit.progress import track

EXAMPLE = Example({"weight": (0.5, 0.3, 0.2)}, neutral={}, rtol=1e-5)

RNG = np.random.default_rng(0)


def combined(x: np.ndarray, f: np.ndarray, **params: object) -> np.ndarray:
    loaded, given = load_method("fisher"), settings("fisher", params, len(x))
    tensor = Arrays(x)
    tensor.statistics = Measured(f)
    tensor.surveyed = loaded.survey([(tensor, given)])[0]
    state = loaded.prepare(tensor, given)
    return loaded.combine(tensor.x.copy(), given, state, 0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_formula(scale):
    x = RNG.standard_normal((3, 500)).astype(np.float32)
    f = (RNG.random((3, 500)) * scale).astype(np.float32)
    f[:, :50] = 0
    f[1:, 50:100] = 0
    weights = np.array([0.5, 0.3, 0.2])
    shares = weights[:, None] * f.astype(np.float64)
    shares[:, :50] = weights[:, None]
    expected = (shares * x).sum(0) / shares.sum(0)
    np.testing.assert_allclose(combined(x, f, weight=tuple(weights)), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(combined(x, f, weight=(1.0,))[50:100], x[0, 50:100], rtol=1e-6)


def test_normalized_and_floored():
    x = RNG.standard_normal((2, 100)).astype(np.float32)
    f = RNG.random((2, 100)).astype(np.float32) * np.array([[1], [1000]], np.float32)
    unit = f.astype(np.float64) / np.linalg.norm(f.astype(np.float64), axis=1, keepdims=True)
    expected = (unit * x).sum(0) / unit.sum(0)
    np.testing.assert_allclose(combined(x, f, normalize=True), expected, rtol=1e-4, atol=1e-6)
    floored = np.maximum(f, 0.5).astype(np.float64)
    expected = (floored * x).sum(0) / floored.sum(0)
    np.testing.assert_allclose(combined(x, f, floor=0.5), expected, rtol=1e-4, atol=1e-6)


def test_without_statistics_it_is_the_average():
    x = RNG.standard_normal((3, 9)).astype(np.float32)
    loaded, given = load_method("fisher"), settings("fisher", {"weight": (1.0, 2.0, 1.0)}, 3)
    tensor = Arrays(x)
    got = loaded.combine(tensor.x.copy(), given, loaded.prepare(tensor, given), 0)
    np.testing.assert_allclose(got, np.average(x.astype(np.float64), axis=0, weights=(1, 2, 1)), rtol=1e-5, atol=1e-6)
    assert run("fisher", x).shape == (9,)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("fisher")
    base = tiny.llama(num_hidden_layers=2)
    folders = {"base": str(tiny.save_model(base, root / "base"))}
    for i in range(2):
        folders[f"tuned{i}"] = str(tiny.save_model(tiny.tuned(base, i), root / f"tuned{i}"))
        rows = [{"prompt": f"task {i}: {n}", "completion": "yes" * (n + 1)} for n in range(4)]
        (root / f"rows{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders[f"rows{i}"] = str(root / f"rows{i}.jsonl")
    return folders


def information(folder: str, rows: str, spec: DataSpec, labels: str = "data") -> dict[str, torch.Tensor]:
    """The mean squared gradient, from one backward pass per example in float64."""
    model = tiny.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with open_checkpoint(folder) as checkpoint:
        examples = examples_of([rows], tokenizer_of(checkpoint), tiny.CONTEXT, spec)
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in examples:
        model.zero_grad()
        # transformers' own loss is the mean over the trained tokens.
        output = model(input_ids=torch.tensor([example.tokens]), labels=torch.tensor([example.labels]))
        (output.loss * example.num_trained).backward()
        for name, p in model.named_parameters():
            found[name] += p.grad**2 / len(examples)
    return found


def test_information_is_that_of_autograd_and_the_merge_weighs_by_it(family, tmp_path):
    models = [{"model": family[f"tuned{i}"], "data": family[f"rows{i}"]} for i in range(2)]
    spec = {"merge_method": "fisher", "models": models, "data": {"limit": 3, "device": "cpu"}}
    merge(spec, tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").glob("statistics*"))
    fishers = [information(family[f"tuned{i}"], family[f"rows{i}"], DataSpec(limit=3)) for i in range(2)]
    got = load_file(tmp_path / "out" / "model.safetensors")
    states = [load_file(Path(family[f"tuned{i}"]) / "model.safetensors") for i in range(2)]
    for name, value in got.items():
        top = sum(f[name] * s[name].double() for f, s in zip(fishers, states, strict=True))
        bottom = sum(f[name] for f in fishers)
        expected = torch.where(bottom > 0, top / bottom, (states[0][name] + states[1][name]).double() / 2)
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-5)


def test_labels_drawn_from_the_model_have_the_fisher_information_as_their_mean(family):
    """For one token after a prompt the expectation over all labels is a finite sum."""
    model = tiny.LlamaForCausalLM.from_pretrained(family["tuned0"], dtype=torch.float32)
    with open_checkpoint(family["tuned0"]) as checkpoint:
        spec = DataSpec(limit=1, labels="model")
        (example,) = examples_of([family["rows0"]], tokenizer_of(checkpoint), tiny.CONTEXT, spec)
        cut = next(i for i, label in enumerate(example.labels) if label >= 0) + 1
        example = type(example)(example.tokens[:cut], example.labels[:cut])
        many = [example] * 1200
        with track("", len(many), unit="", quiet=True) as progress:
            found = dict(fisher.measure(model, checkpoint, many, spec, progress))
    name = "model.norm.weight"
    log = model(input_ids=torch.tensor([example.tokens]), use_cache=False).logits[0, -2].log_softmax(-1)
    weight = dict(model.named_parameters())[name]
    expected = torch.zeros_like(weight)
    for token in range(len(log)):
        (gradient,) = torch.autograd.grad(log[token], weight, retain_graph=True)
        expected += log[token].exp().detach() * gradient**2
    assert abs(float(found[name].sum() / expected.sum()) - 1) < 0.15


def test_loras_are_measured_as_the_models_that_they_make(base, loras, family, tmp_path):
    models = [{"model": str(loras[name]), "data": family["rows0"]} for name in ("plain", "dora")]
    spec = {"merge_method": "fisher", "base_model": str(base), "models": models, "data": {"limit": 2}}
    assert merge(spec, tmp_path / "out", quiet=True).non_finite == []
    from peft import PeftModel

    for name in ("plain", "dora"):
        whole = PeftModel.from_pretrained(tiny.LlamaForCausalLM.from_pretrained(base), loras[name]).merge_and_unload()
        tiny.save_model(whole, tmp_path / name)
    models = [{"model": str(tmp_path / name), "data": family["rows0"]} for name in ("plain", "dora")]
    merge(spec | {"models": models}, tmp_path / "whole", quiet=True)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_plan_says_what_measuring_holds(family):
    models = [{"model": family["tuned0"], "data": family["rows0"]}]
    plan = make_plan({"merge_method": "fisher", "models": models})
    weights = load_file(Path(family["tuned0"]) / "model.safetensors")
    assert plan.statistics_bytes == 3 * 4 * sum(value.numel() for value in weights.values())
    assert "models are run on data first" in str(plan.table().title)


def test_data_that_is_missing_or_not_used(family, tmp_path):
    spec = {"merge_method": "fisher", "models": [{"model": family["tuned0"]}, {"model": family["tuned1"]}]}
    with pytest.raises(SpecError, match=r"models\[1\].data: required by fisher"):
        make_plan(spec)
    with pytest.raises(SpecError, match=r"data.files: /nowhere.jsonl: no such file"):
        make_plan(spec | {"data": {"files": "/nowhere.jsonl"}})
    with pytest.raises(SpecError, match="data: linear measures nothing on data"):
        make_plan(spec | {"merge_method": "linear", "parameters": {"weight": 1}, "data": {"files": family["rows0"]}})
    inner = spec | {"data": {"files": family["rows0"]}}
    with pytest.raises(SpecError, match=r"models\[0\].model.data: a merge inside a merge cannot be measured"):
        make_plan({"merge_method": "passthrough", "models": [{"model": inner}]})
