"""`atlas` against its base, its fine-tunes, and coefficients that were planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import toolkit
from tests import tiny
from tests.merge.learned import problems
from tests.merge.learned.test_adamerging import task_arithmetic
from toolkit.merge.learning.coefficients import Coefficients
from toolkit.merge.learning.descend import most_informative
from toolkit.merge.learning.spec import CoefficientParams


@pytest.mark.system("atlas")
def test_start_is_the_base(tmp_path):
    spec = problems.classification(tmp_path) | {"method": "atlas", "parameters": {"steps": 0}}
    result = toolkit.learn(spec, tmp_path / "out", quiet=True)
    base, found = problems.weights(spec["base_model"]), problems.weights(tmp_path / "out" / "merged")
    assert all(torch.equal(found[name], value) for name, value in base.items())
    blocks = [name for name, value in problems.bert().named_parameters() if value.ndim]
    assert sum(map(len, result.coefficients.values())) == 2 * len(blocks)


@pytest.mark.system("atlas")
def test_one_coefficient_everywhere_is_task_arithmetic(tmp_path):
    spec = problems.classification(tmp_path) | {"method": "atlas", "parameters": {"steps": 0, "start": -0.6}}
    toolkit.learn(spec, tmp_path / "out", quiet=True)
    expected = task_arithmetic(spec, -0.6, tmp_path / "plain")
    found = problems.weights(tmp_path / "out" / "merged")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.system("atlas")
def test_one_hot_coefficients_are_that_fine_tune(base, tmp_path):
    forms = problems.every_form(base, tmp_path)
    engine = problems.engine(base, forms, granularity="tensor")
    engine.expert(0)
    full = problems.weights(forms["full"])
    for name, value in engine.model.named_parameters():
        torch.testing.assert_close(value.detach(), full[name], rtol=1e-6, atol=1e-7)
    engine.expert(1)
    merged = tiny.load_merged(base, tmp_path / "lora").state_dict()
    for name, value in engine.model.named_parameters():
        torch.testing.assert_close(value.detach(), merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.system("atlas")
def test_planted_coefficients_are_found(base, tmp_path):
    """The target is base + 0.5 tau_1 in the attention, and base - 0.3 tau_2 in the MLPs; only logits are seen."""
    models = {}
    for index, name in enumerate(("one", "two")):
        models[name] = str(tiny.save_model(tiny.tuned(tiny.llama(), index, scale=0.05), tmp_path / name))
    one, two = (problems.weights(model) for model in models.values())
    target = tiny.llama()
    with torch.no_grad():
        for name, value in target.named_parameters():
            if "self_attn" in name:
                value.add_(0.5 * (one[name] - value))
            elif "mlp" in name:
                value.add_(-0.3 * (two[name] - value))
    ids = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = target(ids).logits
    groups = {"attention": ["self_attn"], "mlp": ["mlp"]}
    engine = problems.engine(base, models, granularity="groups", groups=groups)
    coefficients = Coefficients(2, len(engine.blocks.groups), CoefficientParams(start=0.0))
    optimizer = torch.optim.Adam(coefficients.parameters, lr=0.03)
    for _ in range(120):
        values = coefficients.values()
        _, gradient = engine.gradient(values, [lambda: (engine.model(ids).logits - wanted).square().mean()])
        optimizer.zero_grad()
        coefficients.backward(gradient)
        optimizer.step()
    found = dict(zip(engine.blocks.groups, coefficients.values().T, strict=True))
    np.testing.assert_allclose(found["attention"], [0.5, 0], atol=0.02)
    np.testing.assert_allclose(found["mlp"], [0, -0.3], atol=0.02)
    np.testing.assert_allclose(found["rest"], [0, 0], atol=0.02)


@pytest.mark.system("atlas")
def test_only_the_most_informative_tensors_are_learned(tmp_path):
    spec = problems.classification(tmp_path) | {"method": "atlas", "parameters": {"steps": 3, "informative": 0.25}}
    result = toolkit.learn(spec, tmp_path / "out", quiet=True)
    values = np.array([list(row.values()) for row in result.coefficients.values()])
    moved = np.any(values != 0, axis=0)
    assert moved.sum() == result.numbers["learned_groups"] == round(0.25 * values.shape[1])
    gradient = np.array([[3.0, 0, 1, -2], [0, 0, -4, 1]])
    np.testing.assert_array_equal(most_informative(gradient, 0.5), [[1, 0, 1, 0], [1, 0, 1, 0]])
    np.testing.assert_array_equal(most_informative(gradient, 0.01), [[0, 0, 1, 0], [0, 0, 1, 0]])


@pytest.mark.system("atlas")
def test_supervised_loss_falls(tmp_path):
    spec = problems.classification(tmp_path) | {"method": "atlas", "parameters": {"steps": 15, "batch_size": 12}}
    found = toolkit.learn(spec, tmp_path / "out", quiet=True)
    assert found.numbers["losses"][-1] < found.numbers["losses"][0] - 0.05
    assert found.numbers["data"] == "texts and labels"
    assert found.numbers["rows"] == {"task0": 12, "task1": 12}
