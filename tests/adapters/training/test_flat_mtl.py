"""SAM over tasks: on a quadratic its gradient is known; without a radius it is the base optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.adapters.parts import parts_of
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.train import train
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError


def method_of(rho: float):
    sources = [{"path": f"{task}.jsonl", "task": task} for task in "ab"]
    training = {"methods": {"method": "flat_mtl", "rho": rho}}
    (method,) = parts_of(TrainSpec(base="x", data={"train": sources}, training=training)).methods  # pyright: ignore[reportArgumentType]
    return method


class Quadratics(nn.Module):
    """For each task `t` the loss `w A_t w / 2`, of one row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(5, dtype=torch.float64))
        roots = torch.randn(3, 5, 5, dtype=torch.float64)
        self.matrices = roots @ roots.transpose(1, 2)
        self.passes: list[list[int]] = []
        self.seen: list[torch.Tensor] = []

    def proceed(self, inputs):
        tasks = inputs["task_ids"].tolist()
        self.passes.append(tasks)
        self.seen.append(self.w.detach().clone())
        loss = sum(self.w @ self.matrices[task] @ self.w / 2 for task in tasks)
        loss.backward()
        return loss.detach()


@pytest.mark.system("flat_mtl")
@pytest.mark.parametrize("tasks", [[0], [0, 1], [2, 0, 1]])
def test_gradient_is_that_at_the_worst_point_of_each_task(tasks):
    model, rho = Quadratics(), 0.7
    before = model.w.detach().clone()
    model.w.grad = torch.ones(5, dtype=torch.float64)
    loss = method_of(rho).step(None, model, {"task_ids": torch.tensor(tasks)}, model.proceed)
    wanted, total = torch.ones(5, dtype=torch.float64), 0.0
    for task in tasks:
        gradient = model.matrices[task] @ before
        wanted = wanted + model.matrices[task] @ (before + rho * gradient / gradient.norm())
        total += float(before @ gradient / 2)
    torch.testing.assert_close(model.w.grad, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.w.detach(), before), "the weights come back to the bit"
    assert float(loss) == pytest.approx(total)
    assert sorted(model.passes) == sorted([[task] for task in tasks] * 2), "two passes per task"


@pytest.mark.system("flat_mtl")
def test_radius_zero_takes_the_very_steps_of_the_base_optimizer(base, tmp_path):
    """One task and dropout: both passes must draw the same, and the run as much of the generator as without."""
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i}", "completion": "abc" * (1 + i % 3)} for i in range(12)])
    files = []
    for name, methods in (
        ("plain", ()),
        ("sam", {"method": "flat_mtl", "rho": 0.0}),
        ("moved", {"method": "flat_mtl"}),
    ):
        spec = {
            "base": str(base),
            "adapter": {"method": "lora", "r": 2, "lora_dropout": 0.2},
            "data": {"train": {"path": str(tmp_path / "a.jsonl"), "task": "a"}},
            "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01, "methods": methods},
            "device": "cpu",
        }
        files.append((train(spec, tmp_path / name, quiet=True).path / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_accumulated_gradients_are_refused(tmp_path):
    training = {"methods": "flat_mtl", "gradient_accumulation_steps": 2}
    spec = {"base": "x", "data": {"train": {"path": "a", "task": "a"}}, "training": training}
    with pytest.raises(SpecError, match="flat_mtl moves the weights once per task and step; raise batch_size instead"):
        train(spec, tmp_path / "out", quiet=True)
