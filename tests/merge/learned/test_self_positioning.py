"""`self_positioning` against a grid search of the simplex, and its vertices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import toolkit
from tests.merge.learned import problems
from toolkit.merge.learning import losses


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Three encoders, and pairs of texts for each of two probe sets."""
    folder = tmp_path_factory.mktemp("probe")
    base, models = problems.encoders(folder, 3, scale=0.15)
    tasks = {}
    for index in range(2):
        pairs = [{"text": f"{7 * i + index} of", "positive": f"{7 * i + index} is {i}"} for i in range(8)]
        tasks[f"probe{index}"] = problems.rows(folder / f"{index}.jsonl", pairs)
    return {"method": "self_positioning", "base_model": str(base), "models": models, "tasks": tasks, "device": "cpu"}


def loss_at(spec, values: np.ndarray, temperature: float = 0.2) -> float:
    """Both probe sets' contrastive loss of a model that is put together here."""
    start, tuned = problems.weights(spec["base_model"]), [problems.weights(m) for m in spec["models"].values()]
    model = problems.bert()
    state = {
        n: v + sum(c * (t[n] - v) for c, t in zip(values, tuned, strict=True))
        for n, v in start.items()
        if v.is_floating_point()
    }
    model.load_state_dict(state, strict=False)
    total = 0.0
    for index in range(2):
        vectors = []
        for text in ("{} of", "{} is {}"):
            texts = [text.format(7 * i + index, i) for i in range(8)]
            vectors.append(
                torch.cat([model(torch.tensor([list(t.encode())])).last_hidden_state.mean(1) for t in texts])
            )
        total += float(losses.contrastive(*vectors, temperature))
    return total


@pytest.mark.system("self_positioning")
@torch.no_grad()
def test_descent_lands_where_a_grid_search_does(probe, tmp_path):
    parameters = {"scale": None, "temperature": 0.2, "steps": 60, "batch_size": 8, "learning_rate": 0.1}
    with torch.enable_grad():
        result = toolkit.learn(probe | {"parameters": parameters, "merged": False}, tmp_path / "out", quiet=True)
    found = np.array([row["all"] for row in result.coefficients.values()])
    coarse = [np.array([i, j, 8 - i - j]) / 8 for i in range(9) for j in range(9 - i)]
    best = min(coarse, key=lambda point: loss_at(probe, point))
    around = [best + np.array([i, j, -i - j]) / 24 for i in range(-3, 4) for j in range(-3, 4)]
    best = min((p for p in around if p.min() >= 0), key=lambda point: loss_at(probe, point))
    start = loss_at(probe, np.full(3, 1 / 3))
    assert result.numbers["losses"][0] == pytest.approx(start, rel=1e-4)
    assert loss_at(probe, best) < start - 0.01, "the best point is not where it starts"
    assert loss_at(probe, found) <= loss_at(probe, best) + 1e-3
    np.testing.assert_allclose(found, best, atol=0.05)


@pytest.mark.system("self_positioning")
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_weights_stay_in_the_declared_set(steps, probe, tmp_path):
    parameters = {"scale": None, "steps": steps, "learning_rate": 3.0}
    result = toolkit.learn(probe | {"parameters": parameters, "merged": False}, tmp_path / "out", quiet=True)
    weights = np.array([row["all"] for row in result.coefficients.values()])
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert weights.max() > 0.5


@pytest.mark.system("self_positioning")
def test_a_vertex_with_scale_1_is_that_model(probe):
    engine = problems.engine(probe["base_model"], probe["models"], encoder=True)
    for index, model in enumerate(probe["models"].values()):
        engine.set(np.eye(3)[:, [index]])
        wanted = problems.weights(model)
        for name, value in engine.parameters.items():
            torch.testing.assert_close(value.detach(), wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.system("self_positioning")
def test_same_seed_same_result(probe, tmp_path):
    runs = []
    for index, seed in enumerate((0, 0, 1)):
        parameters = {"steps": 3, "batch_size": 3, "seed": seed, "learning_rate": 0.1}
        spec = probe | {"parameters": parameters, "merged": False}
        runs.append(toolkit.learn(spec, tmp_path / f"{index}", quiet=True).coefficients)
    assert runs[0] == runs[1] != runs[2]


def test_scale_is_trained_and_the_penalty_holds_back(probe, tmp_path):
    given = {"steps": 5, "batch_size": 8, "learning_rate": 0.05}
    free = toolkit.learn(probe | {"parameters": given, "merged": False}, tmp_path / "free", quiet=True)
    total = sum(row["all"] for row in free.coefficients.values())
    assert free.numbers["scale"] == pytest.approx(total)
    assert total != pytest.approx(1, abs=1e-3)
    held = toolkit.learn(
        probe | {"parameters": given | {"penalty": 5.0}, "merged": False}, tmp_path / "held", quiet=True
    )

    def distance(result) -> float:
        values = np.array([row["all"] for row in result.coefficients.values()]) / result.numbers["scale"]
        return float(np.abs(values - 1 / 3).max())

    assert distance(held) < 0.7 * distance(free)
