"""`lorahub` finds weights of LoRAs by losses alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import toolkit
from tests import tiny
from tests.merge.learned import problems


@pytest.fixture
def spec(base, tmp_path):
    """Two LoRAs, and what the model at coefficients 0.9 and -0.5 says of a few prompts."""
    models = {name: str(tiny.save_lora(base, tmp_path / name, seed=i, strength=0.2)) for i, name in enumerate("ab")}
    merged = [tiny.load_merged(base, tmp_path / name).state_dict() for name in "ab"]
    model = tiny.llama()
    with torch.no_grad():
        for name, value in model.named_parameters():
            start = value.clone()
            for share, other in zip((0.9, -0.5), merged, strict=True):
                value.add_(share * (other[name] - start))
    prompts = [f"question {i * 7}" for i in range(24)]
    data = []
    for prompt in prompts:
        logits = model(torch.tensor([list(prompt.encode())])).logits[0, -1, :128].clone()
        logits[:32] = -torch.inf
        data.append({"prompt": prompt, "completion": chr(int(logits.argmax()))})
    tasks = {"new": {"data": problems.rows(tmp_path / "new.jsonl", data), "positions": "last"}}
    return {"method": "lorahub", "base_model": str(base), "models": models, "tasks": tasks, "device": "cpu"}


def test_finds_a_better_mixture_without_gradients(spec, tmp_path, monkeypatch):
    def refused(*args, **options):
        raise AssertionError("no gradient is needed")

    monkeypatch.setattr(torch.Tensor, "backward", refused)
    result = toolkit.learn(spec | {"parameters": {"steps": 60, "penalty": 0.0}}, tmp_path / "out", quiet=True)
    found = result.numbers["losses"]
    assert len(found) == 60
    assert min(found) < 0.8 * found[0]
    values = np.array([row["all"] for row in result.coefficients.values()])
    assert values[0] > 0.3
    assert values[1] < 0.1
    assert np.abs(values).max() <= 1.5


def test_the_penalty_is_part_of_what_is_minimised(spec, tmp_path):
    runs = {}
    for penalty in (0.0, 2.0):
        parameters = {"steps": 1, "penalty": penalty, "start": 0.5}
        result = toolkit.learn(spec | {"parameters": parameters}, tmp_path / str(penalty), quiet=True)
        assert [row["all"] for row in result.coefficients.values()] == [0.5, 0.5]
        runs[penalty] = result.numbers["losses"][0]
    assert runs[2.0] - runs[0.0] == pytest.approx(2.0 * 0.5)


def test_same_seed_same_candidates(spec, tmp_path):
    runs = []
    for index, seed in enumerate((3, 3, 4)):
        parameters = {"steps": 5, "seed": seed}
        runs.append(toolkit.learn(spec | {"parameters": parameters}, tmp_path / str(index), quiet=True))
    assert runs[0].numbers["losses"] == runs[1].numbers["losses"] != runs[2].numbers["losses"]
