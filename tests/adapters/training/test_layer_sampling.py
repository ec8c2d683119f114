"""Layers that are not drawn stay as they are, without state; all of them at once is full training."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from toolkit.adapters.loop import AdapterTrainer
from toolkit.adapters.train import train
from toolkit.adapters.training.layer_sampling import drawn
from toolkit.checkpoints.layout import layer_of
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError


def spec_of(base, tmp_path, methods, **training) -> dict:
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i} ", "completion": "yes"} for i in range(16)])
    settings = {"max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "methods": methods} | training
    data = {"train": str(tmp_path / "a.jsonl")}
    return {"base": str(base), "adapter": {"method": "full"}, "data": data, "training": settings, "device": "cpu"}


def test_every_layer_is_drawn_as_often():
    counts = Counter(layer for period in range(3000) for layer in drawn(8, 3, 0, period))
    assert all(abs(counts[layer] - 1125) < 4 * (3000 * 3 / 8 * 5 / 8) ** 0.5 for layer in range(8))
    assert drawn(8, 3, 0, 5) == drawn(8, 3, 0, 5)
    assert {frozenset(drawn(8, 3, seed, 5)) for seed in range(9)} != {frozenset(drawn(8, 3, 0, 5))}
    assert drawn(2, 5, 0, 0) == {0, 1}


def test_only_drawn_layers_move_and_have_state(base, tmp_path, monkeypatch):
    old, seen = AdapterTrainer.training_step, []

    def watched(self, model, inputs, count=None):
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        loss = old(self, model, inputs, count)
        held = {layer_of(n) for n, p in model.named_parameters() if p in self.optimizer.state}
        with_gradient = {layer_of(n) for n, p in model.named_parameters() if p.grad is not None}
        seen.append((held - {None}, with_gradient - {None}))
        return loss

    monkeypatch.setattr(AdapterTrainer, "training_step", watched)
    method = {"method": "layer_sampling", "layers": 1, "every": 2}
    train(spec_of(base, tmp_path, method), tmp_path / "out", quiet=True)
    values, notes = seen[::2], seen[1::2]
    moved = []
    for step in range(5):
        changed = {layer_of(n) for n, v in values[step].items() if not torch.equal(v, values[step + 1][n])}
        (layer,) = drawn(3, 1, 0, step // 2)
        assert changed == {None, ("model.layers", layer)}, "embeddings, norm and head always"
        held, with_gradient = notes[step]
        assert with_gradient == {("model.layers", layer)}
        assert held <= {("model.layers", layer)}
        moved.append(layer)
    assert len(set(moved)) > 1


def test_all_layers_at_once_is_full_training_and_a_resumed_run_the_same(base, tmp_path, monkeypatch):
    method = {"method": "layer_sampling", "layers": 3}
    runs = [train(spec_of(base, tmp_path, m), tmp_path / str(i), quiet=True).path for i, m in enumerate(((), method))]
    assert len({(r / "model.safetensors").read_bytes() for r in runs}) == 1
    spec = spec_of(base, tmp_path, {"method": "layer_sampling", "layers": 1, "every": 2}, save_steps=3)
    done = train(spec, tmp_path / "done", quiet=True).path
    old = AdapterTrainer.training_step
    with monkeypatch.context() as patched:

        def stopped(self, *args):
            if self.state.global_step == 4:
                raise ZeroDivisionError
            return old(self, *args)

        patched.setattr(AdapterTrainer, "training_step", stopped)
        with pytest.raises(ZeroDivisionError):
            train(spec, tmp_path / "again", quiet=True)
    again = train(spec, tmp_path / "again", resume=True, quiet=True).path
    assert (again / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()


def test_layers_that_the_spec_leaves_out_are_never_drawn(base, tmp_path):
    spec = spec_of(base, tmp_path, {"method": "layer_sampling", "layers": 1, "every": 1})
    spec["adapter"] = {"method": "full", "layers": [0, 2]}
    folder = train(spec, tmp_path / "out", quiet=True).path
    before, after = (load_file(place / "model.safetensors") for place in (base, folder))
    moved = {layer_of(name) for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == {("model.layers", 0), ("model.layers", 2)}


def test_adapters_are_refused(base, tmp_path):
    spec = spec_of(base, tmp_path, "layer_sampling")
    spec["adapter"] = {"method": "lora"}
    with pytest.raises(SpecError, match="layer_sampling trains the model's own layers; expected full"):
        train(spec, tmp_path / "out", quiet=True)
