"""`adamerging` against task arithmetic, finite differences in float64, and what its paper promises of a run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call

import toolkit
from tests.merge.learned import problems
from toolkit.merge.learning import descend, losses
from toolkit.merge.learning.heads import read_head
from toolkit.merge.run import merge


def spec_of(folder: Path, tasks: int = 2, count: int = 12, **parameters: Any) -> dict[str, Any]:
    return problems.classification(folder, tasks, count) | {"method": "adamerging", "parameters": parameters}


def task_arithmetic(spec: dict[str, Any], scale: float, out: Path) -> dict[str, torch.Tensor]:
    models = [{"model": model} for model in spec["models"].values()]
    plain = {"merge_method": "task_arithmetic", "base_model": spec["base_model"], "models": models}
    merge(plain | {"parameters": {"lambda": scale}}, out, quiet=True)
    return problems.weights(out)


@pytest.mark.system("adamerging")
@pytest.mark.parametrize("granularity", ["task", "layer", "tensor"])
def test_no_steps_are_task_arithmetic(granularity, tmp_path):
    spec = spec_of(tmp_path, steps=0, granularity=granularity)
    toolkit.learn(spec, tmp_path / "out", quiet=True)
    expected = task_arithmetic(spec, 0.3, tmp_path / "plain")
    found = problems.weights(tmp_path / "out" / "merged")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.system("adamerging")
def test_gradient_of_the_entropy_is_that_of_finite_differences(tmp_path):
    spec = spec_of(tmp_path)
    engine = problems.engine(spec["base_model"], spec["models"], encoder=True)
    heads = [read_head(task["head"]) for task in spec["tasks"].values()]
    ids = torch.arange(40).reshape(2, 20) + 30
    start = {name: value.double() for name, value in problems.bert().named_parameters()}
    taus = [
        {name: value.double() - start[name] for name, value in problems.weights(model).items() if name in start}
        for model in spec["models"].values()
    ]
    model = problems.bert().double()

    def total(c: np.ndarray) -> float:
        mixed = {
            n: value + sum(float(k) * tau[n] for k, tau in zip(c, taus, strict=True)) for n, value in start.items()
        }
        with torch.no_grad():
            pooled = functional_call(model, mixed, (ids,)).last_hidden_state.mean(1)
        logits = [pooled @ head.weight.double().T + head.bias.double() for head in heads]
        return sum(-float((x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean()) for x in logits)

    at, step = np.array([0.3, 0.7]), 1e-5
    expected = [(total(at + step * e) - total(at - step * e)) / (2 * step) for e in np.eye(2)]

    def loss(index: int) -> torch.Tensor:
        return losses.entropy(heads[index](engine.model(ids).last_hidden_state.mean(1)))

    value, found = engine.gradient(at[:, None], [lambda: loss(0), lambda: loss(1)])
    assert value == pytest.approx(total(at), rel=1e-5)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found[:, 0], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.system("adamerging")
def test_tied_rows_of_the_layer_wise_mode_are_the_task_wise_mode(tmp_path):
    spec = spec_of(tmp_path)
    ids = torch.arange(40).reshape(2, 20) + 30
    found = {}
    for granularity in ("task", "tensor", "layer"):
        engine = problems.engine(spec["base_model"], spec["models"], encoder=True, granularity=granularity)
        values = np.full((2, len(engine.blocks.groups)), 0.3)
        loss = lambda engine=engine: losses.entropy(engine.model(ids).last_hidden_state.flatten(0, 1))  # noqa: E731
        found[granularity] = engine.gradient(values, [loss])[1]
    assert found["tensor"].shape[1] > found["layer"].shape[1] > 1
    for finer in ("tensor", "layer"):
        np.testing.assert_allclose(found[finer].sum(1), found["task"][:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.system("adamerging")
def test_coefficients_stay_between_their_bounds(tmp_path):
    result = toolkit.learn(spec_of(tmp_path, steps=6, learning_rate=0.4), tmp_path / "out", quiet=True)
    values = np.array([list(row.values()) for row in result.coefficients.values()])
    assert values.min() >= 0
    assert values.max() <= 1
    assert {values.min(), values.max()} == {0.0, 1.0}, "the rate is so large that bounds are met"


@pytest.mark.system("adamerging")
def test_a_coefficient_leaves_its_bound_again(tmp_path):
    """The gradient of one that lies on the bound is not lost."""
    up = toolkit.learn(spec_of(tmp_path, steps=2, learning_rate=0.9, optimizer="sgd"), tmp_path / "up", quiet=True)
    free = toolkit.learn(
        spec_of(tmp_path / "free", steps=25, start=0.0, granularity="task", learning_rate=0.05),
        tmp_path / "out",
        quiet=True,
    )
    assert up.coefficients
    assert max(row["all"] for row in free.coefficients.values()) > 0.1


@pytest.mark.system("adamerging")
def test_entropy_falls_with_a_small_rate(tmp_path):
    spec = spec_of(tmp_path, steps=12, learning_rate=2e-3, batch_size=12)
    found = toolkit.learn(spec, tmp_path / "out", quiet=True).numbers["losses"]
    assert all(after <= before + 1e-6 for before, after in pairwise(found))
    assert found[-1] < found[0]


@pytest.mark.system("adamerging")
def test_equal_task_vectors_get_equal_coefficients(tmp_path):
    spec = spec_of(tmp_path, steps=5, learning_rate=0.02)
    spec["models"]["task1"] = spec["models"]["task0"]
    result = toolkit.learn(spec, tmp_path / "out", quiet=True)
    assert result.coefficients["task0"] == result.coefficients["task1"]
    assert len(set(result.coefficients["task0"].values())) > 2


@pytest.mark.system("adamerging")
def test_the_optimizer_knows_coefficients_alone(tmp_path, monkeypatch):
    made = []

    class Watched(torch.optim.Adam):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(descend.torch.optim, "Adam", Watched)
    result = toolkit.learn(spec_of(tmp_path, steps=1), tmp_path / "out", quiet=True)
    coefficients = sum(map(len, result.coefficients.values()))
    (optimizer,) = made
    state = [value for values in optimizer.state.values() for value in values.values() if value.numel() > 1]
    assert [value.numel() for value in state] == [coefficients, coefficients]


@pytest.mark.system("adamerging")
def test_plus_plus_scales_what_ties_keeps(tmp_path):
    """Without steps it is the sum of what TIES keeps of each task vector, times 0.3, by whole-model arrays."""
    spec = spec_of(tmp_path, tasks=3, steps=0, density=0.2)
    toolkit.learn(spec, tmp_path / "out", quiet=True)
    start = problems.weights(spec["base_model"])
    names = [name for name, value in start.items() if value.is_floating_point()]
    flat = [
        np.concatenate([(problems.weights(m)[n] - start[n]).numpy().ravel() for n in names])
        for m in spec["models"].values()
    ]
    x = np.stack(flat)
    kept = int(0.2 * x.shape[1])
    for row in x:
        row[np.argsort(-np.abs(row), kind="stable")[kept:]] = 0
    sign = np.sign(x.sum(0))
    expected = 0.3 * np.where(np.sign(x) == sign, x, 0).sum(0)
    merged = problems.weights(tmp_path / "out" / "merged")
    found = np.concatenate([(merged[n] - start[n]).numpy().ravel() for n in names])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0.2 < np.count_nonzero(expected) / len(expected) < 0.6
