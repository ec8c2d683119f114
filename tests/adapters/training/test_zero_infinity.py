"""Weights that come and go change nothing, to the bit; a few layers are there at once, each read ahead."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests import tiny
from toolkit.adapters.train import train
from toolkit.adapters.training._offload import Store, TiledLinear, Window
from toolkit.adapters.training.zero_infinity import offloaded
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError


def adapted(layers: int = 6) -> Any:
    model = tiny.llama(num_hidden_layers=layers)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.system("zero_infinity")
@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
def test_a_tiled_linear_is_the_linear(tile):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True), torch.randn(64, 8, dtype=torch.float64)
    sent = torch.randn(3, 5, 64, dtype=torch.float64)
    out = TiledLinear.apply(x, lambda a, b: weight[a:b], 64, tile)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out, x @ weight.T, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(out, x, sent)
    torch.testing.assert_close(found, sent @ weight, rtol=1e-12, atol=1e-12)


@pytest.mark.system("zero_infinity")
@pytest.mark.parametrize("tile", [None, 30])
@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_gradients_are_the_same_and_few_layers_are_there(tmp_path, tier, tile):
    model = adapted()
    model(**batch()).loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    layers = [[p for p in layer.parameters() if not p.requires_grad] for layer in model.base_model.model.model.layers]
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, sum(all(p.numel() for p in part) for part in layers))

    with offloaded(model, tmp_path if tier == "disk" else None, 2, tile) as window:
        assert not any(p.numel() for part in layers for p in part)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(look)
        for _ in range(3):
            model.zero_grad()
            window.begin()
            model(**batch()).loss.backward()
            for name, value in wanted.items():
                tolerance = 1e-5 * float(value.abs().max()) if tile else 0.0
                torch.testing.assert_close(model.get_parameter(name).grad, value, rtol=0, atol=tolerance)
    assert most == 1, "one computes; the next one is read, not yet in its place"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.system("zero_infinity")
def test_order_is_learned_read_ahead_and_learned_anew():
    parts = [[nn.Parameter(torch.full((3,), float(i)))] for i in range(4)]
    shared = nn.Parameter(torch.ones(2))
    parts[1].append(shared)
    parts[2].append(shared)
    store = Store(None)
    for part in parts:
        store.take(part)
    reads: list[tuple[float, str]] = []
    old = store.rows

    def rows(p, *span):
        value = old(p, *span)
        reads.append((float(value.detach()[0]) if p is not shared else -1.0, threading.current_thread().name[:7]))
        return value

    store.rows = rows  # pyright: ignore[reportAttributeAccessIssue]
    window = Window(store, parts, 3)

    def go(*order: int) -> list[tuple[float, str]]:
        reads.clear()
        window.begin()
        for part in order:
            window.enter(part)
            assert all(p.numel() for p in parts[part])
            assert float(parts[part][0].detach()[0]) == part
        return list(reads)

    first = go(0, 1, 2, 3, 2, 1, 0)
    assert all(name == "MainThr" for _, name in first)
    assert [value for value, _ in first] == [0, 1, -1, 2, 3, 1, 0], "the shared weight is read once"
    second = go(0, 1, 2, 3, 2, 1, 0)
    assert {name for _, name in second} == {"weights"}, "from the second pass on all is read ahead"
    assert [value for value, _ in second] == [2, 3, 1, 0], "in the order of the first; two were there still"
    strange = go(0, 3, 1, 2)
    assert (3.0, "MainThr") in strange, "what comes out of order is read when it comes"
    again = go(0, 3, 1, 2)
    assert {name for value, name in again if value in (3.0, 1.0, 2.0)} == {"weights"}
    window.close()
    store.give_back()
    assert [float(part[0].data[0]) for part in parts] == [0, 1, 2, 3]
    assert torch.equal(shared.data, torch.ones(2))


@pytest.mark.system("zero_infinity")
def test_all_tiers_end_with_the_same_bytes(base, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i} ", "completion": "abc" * (1 + i % 3)} for i in range(16)])
    (tmp_path / "disk").mkdir()
    disk = {"method": "zero_infinity", "tier": "disk", "folder": str(tmp_path / "disk")}
    ways = [{"gradient_checkpointing": True}, {"methods": "zero_infinity"}, {"methods": disk}]
    files, losses = [], []
    for i, way in enumerate(ways):
        training = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "save_steps": 2, "keep_checkpoints": True}
        data = {"train": str(tmp_path / "a.jsonl"), "validation": str(tmp_path / "a.jsonl")}
        spec = {"base": str(base), "adapter": {"method": "lora", "lora_dropout": 0.2}, "data": data, "device": "cpu"}
        done = train(spec | {"training": training | way}, tmp_path / str(i), quiet=True)
        files.append((done.path / "adapter_model.safetensors").read_bytes())
        losses.append((done.numbers["train_loss"], done.numbers["eval_loss"], done.numbers["parameters"]))
        halfway = done.path / "checkpoints" / "checkpoint-2"
        assert PeftModel.from_pretrained(tiny.load_merged(base, None), str(halfway))
    assert files[0] == files[1] == files[2]
    assert losses[0] == losses[1] == losses[2]
    assert not list((tmp_path / "disk").iterdir()), "the files are gone"


def test_a_teacher_that_is_the_base_finds_its_weights(base, tmp_path):
    """Squarehead runs the base a second time in every step."""
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i} ", "completion": "yes"} for i in range(8)])
    files = []
    for i, way in enumerate([{"gradient_checkpointing": True}, {}]):
        methods = ["squarehead"] if way else ["squarehead", "zero_infinity"]
        training = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01, "methods": methods} | way
        spec = {"base": str(base), "data": {"train": str(tmp_path / "a.jsonl")}, "training": training, "device": "cpu"}
        files.append((train(spec, tmp_path / str(i), quiet=True).path / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_full_training_is_refused(base, tmp_path):
    spec = {"base": str(base), "adapter": {"method": "full"}, "data": {"train": "a"}}
    with pytest.raises(SpecError, match="zero_infinity keeps a frozen base elsewhere; expected an adapter"):
        train(spec | {"training": {"methods": ["zero_infinity"]}}, tmp_path / "out", quiet=True)
