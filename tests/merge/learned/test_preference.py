"""`preference`: vertices, the simplex, and the moments of a mixture by their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import toolkit
from tests.merge.learned import problems
from toolkit.errors import SpecError
from toolkit.merge.extract import extract
from toolkit.merge.learned.preference import mixture_moments


@pytest.fixture(scope="module")
def hull(tmp_path_factory):
    base, models = problems.encoders(tmp_path_factory.mktemp("hull"), 3)
    return {"method": "preference", "base_model": str(base), "models": models}


@pytest.mark.system("ibcl")
def test_a_preference_for_one_task_is_its_model(hull, tmp_path):
    for name, model in hull["models"].items():
        toolkit.learn(hull | {"parameters": {"weights": {name: 1}}}, tmp_path / name, quiet=True)
        wanted = problems.weights(model)
        for tensor, value in problems.weights(tmp_path / name / "merged").items():
            torch.testing.assert_close(value, wanted[tensor], rtol=1e-6, atol=1e-6)


@pytest.mark.system("ibcl")
def test_between_tasks_it_is_the_average_and_nothing_is_trained(hull, tmp_path, monkeypatch):
    def refused(*args, **options):
        raise AssertionError("no optimizer is needed")

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", refused)
    weights = {"task0": 0.5, "task2": 0.5}
    toolkit.learn(hull | {"parameters": {"weights": weights}}, tmp_path / "out", quiet=True)
    one, _, other = (problems.weights(model) for model in hull["models"].values())
    for name, value in problems.weights(tmp_path / "out" / "merged").items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (one[name] + other[name]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.system("ibcl")
@pytest.mark.parametrize("weights", [{"task0": 0.5}, {"task0": 0.7, "task1": 0.7}, {"task0": 1.5, "task1": -0.5}])
def test_preferences_outside_the_simplex(weights, hull, tmp_path):
    with pytest.raises(SpecError, match=r"parameters"):
        toolkit.learn(hull | {"parameters": {"weights": weights}}, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_preferences_for_nobody(hull, tmp_path):
    with pytest.raises(SpecError, match=r"parameters\.weights\.task9: no such model; did you mean"):
        toolkit.learn(hull | {"parameters": {"weights": {"task9": 1}}}, tmp_path / "out", quiet=True)
    with pytest.raises(SpecError, match=r"tasks: preference looks at no data"):
        given = {"parameters": {"weights": {"task0": 1}}, "tasks": {"task0": "x.jsonl"}}
        toolkit.learn(hull | given, tmp_path / "out", quiet=True)


@pytest.mark.system("ibcl")
def test_moments_of_a_gaussian_mixture(hull, tmp_path):
    """Element by element: E[x], and E[x^2] - E[x]^2 with E[x^2] = sum_i w_i (m_i^2 + s_i^2)."""
    generator = np.random.default_rng(0)
    means, sigmas = generator.standard_normal((3, 50)), np.array([0.1, 0.5, 2.0])
    weights = np.array([0.2, 0.5, 0.3])
    mean = weights @ means
    variance = weights @ (means**2 + sigmas[:, None] ** 2) - mean**2
    found = mixture_moments(weights, means @ means.T, 50 * sigmas**2)
    assert found["mean"] == pytest.approx(float(mean @ mean))
    assert found["variance"] == pytest.approx(float(variance.sum()))
    assert found["within"] == pytest.approx(float(50 * weights @ sigmas**2))
    average = float(50 * weights**2 @ sigmas**2)
    assert found["variance"] > average, "a mixture is wider than an average of independent models"
    parameters = {"weights": {"task0": 0.5, "task1": 0.5}, "sigma": {"task1": 0.01}}
    result = toolkit.learn(hull | {"parameters": parameters, "merged": False}, tmp_path / "out", quiet=True)
    start = problems.weights(hull["base_model"])
    taus = [
        torch.cat(
            [
                (value - start[n]).double().flatten()
                for n, value in problems.weights(m).items()
                if value.is_floating_point()
            ]
        )
        for m in list(hull["models"].values())[:2]
    ]
    between = float((taus[0] - taus[1]).square().sum()) / 4
    assert result.numbers["mixture"]["between"] == pytest.approx(between, rel=1e-5)
    assert result.numbers["mixture"]["within"] == pytest.approx(0.5 * 0.01**2 * len(taus[0]), rel=1e-5)


@pytest.mark.system("ibcl")
def test_the_hull_may_be_one_folder_of_compressed_deltas(hull, tmp_path):
    extract(hull["base_model"], hull["models"], tmp_path / "stored", kind="svd", rank="full", quiet=True)
    weights = {"task0": 0.25, "task1": 0.75}
    spec = hull | {"models": str(tmp_path / "stored"), "parameters": {"weights": weights}}
    result = toolkit.learn(spec, tmp_path / "out", quiet=True)
    assert list(result.coefficients) == ["task0", "task1", "task2"]
    toolkit.learn(hull | {"parameters": {"weights": weights}}, tmp_path / "plain", quiet=True)
    wanted = problems.weights(tmp_path / "plain" / "merged")
    for name, value in problems.weights(tmp_path / "out" / "merged").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
