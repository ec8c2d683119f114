"""Parts that forget are found by how far tasks move them; they alone are fine-tuned on the buffer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from toolkit.adapters.train import train
from toolkit.adapters.training import fpf
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task, answer in (("a", "north"), ("b", "south")):
        write_rows(folder / f"{task}.jsonl", [{"prompt": f"{task} {i}: ", "completion": answer} for i in range(12)])
    return folder


def spec_of(base, folder, methods, **training) -> dict:
    sources = [{"path": str(folder / f"{task}.jsonl"), "task": task} for task in "ab"]
    settings = {
        "num_epochs": 1,
        "batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "methods": methods,
    } | training
    return {"base": str(base), "adapter": {"r": 2}, "data": {"train": sources}, "training": settings, "device": "cpu"}


@pytest.mark.system("fpf")
def test_part_that_tasks_change_is_ranked_first():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = {name: value + 1e-3 * torch.randn(value.shape) for name, value in before.items()}
    after["3.weight"] += 0.5
    moved = fpf.changes(before, after)
    assert fpf.select(moved, model, 1e-9) == ["3.weight"]
    assert fpf.select(moved, model, 0.2)[0] == "3.weight"
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes[name] for name in fpf.select(moved, model, 0.5)) <= 0.5 * sum(sizes.values())
    assert fpf.select(moved, model, 1.0) == sorted(moved, key=lambda name: (-moved[name], name))
    assert moved["3.weight"] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.system("fpf")
def test_only_the_chosen_parts_change_at_the_end(base, tasks, tmp_path):
    method = {"method": "fpf", "share": 0.1, "replay_steps": 3}
    tuned = train(spec_of(base, tasks, method), tmp_path / "tuned", quiet=True)
    # The same run with a replay that moves nothing to speak of.
    plain = train(spec_of(base, tasks, method | {"learning_rate": 1e-30}), tmp_path / "plain", quiet=True)
    a, b = (load_file(r.path / "adapter_model.safetensors") for r in (tuned, plain))
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    assert changed == {name.replace(".default.", ".") for name in tuned.numbers["fine_tuned"]}
    assert tuned.numbers["trainable_parameters"] == sum(value.numel() for value in a.values()), (
        "all go on being trained"
    )
    assert 0 < sum(a[name].numel() for name in changed) <= 0.1 * sum(value.numel() for value in a.values())


@pytest.mark.system("fpf")
@pytest.mark.parametrize(("times", "steps"), [(1, [6]), (2, [3, 6]), (6, [1, 2, 3, 4, 5, 6]), (50, [1, 2, 3, 4, 5, 6])])
def test_replays_come_at_equal_distances_up_to_every_step(times, steps, base, tasks, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(fpf.Fpf, "replay", lambda self, trainer, number: seen.append(trainer.state.global_step))
    train(spec_of(base, tasks, {"method": "fpf", "times": times}), tmp_path / "out", quiet=True)
    assert seen == steps


def test_tasks_are_trained_one_after_another(base, tasks, tmp_path, monkeypatch):
    seen = []
    own = fpf.Fpf.begin_step

    def begin_step(self, trainer, batches):
        seen.extend(set(batch["task_ids"].tolist()) for batch in batches)
        own(self, trainer, batches)

    monkeypatch.setattr(fpf.Fpf, "begin_step", begin_step)
    train(spec_of(base, tasks, "fpf"), tmp_path / "out", quiet=True)
    assert seen == [{0}] * 3 + [{1}] * 3


def test_replay_helps_the_task_that_was_first(base, tasks, tmp_path):
    losses = []
    for steps in (20, 1):
        spec = spec_of(base, tasks, {"method": "fpf", "share": 0.5, "replay_steps": steps}, num_epochs=3)
        spec["data"]["validation"] = [{"path": str(tasks / "a.jsonl"), "task": "a"}]
        losses.append(train(spec, tmp_path / str(steps), quiet=True).numbers["eval_loss"])
    assert losses[0] < 0.8 * losses[1]


def test_one_task_is_refused(base, tasks, tmp_path):
    spec = spec_of(base, tasks, "fpf")
    spec["data"]["train"] = spec["data"]["train"][:1]
    with pytest.raises(SpecError, match="fpf compares the ends of several tasks"):
        train(spec, tmp_path / "out", quiet=True)
