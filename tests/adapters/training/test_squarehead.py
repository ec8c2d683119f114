"""The loss is 0 for equal states and 1 for none, whatever their scale; zeros stay zero through any optimizer."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests import tiny
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.train import train
from toolkit.adapters.training.squarehead import Squarehead, divergence, squarehead, states
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError, UnsupportedError


@pytest.mark.system("squarehead")
def test_equal_is_zero_none_is_one_and_scale_does_not_count():
    torch.manual_seed(0)
    s, t = torch.randn(2, 6, 5, dtype=torch.float64)
    assert float(squarehead([(t, t)])) == 0
    assert float(squarehead([(torch.zeros_like(t), t)] * 3)) == 3, "a layer each"
    one = float(squarehead([(s, t)]))
    assert one == pytest.approx(float(((s - t) ** 2).sum() / (t**2).sum()), rel=1e-12)
    assert float(squarehead([(1e3 * s, 1e3 * t)])) == pytest.approx(one, rel=1e-12)
    p, q = s.softmax(-1), t.softmax(-1)
    assert float(divergence(s, t)) == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-10)


def test_states_are_those_of_transformers():
    model = tiny.llama()
    ids = torch.arange(7)[None]
    with torch.no_grad(), states(model) as found:
        out = model(ids, output_hidden_states=True)
    assert len(found) == 4
    assert all(torch.equal(a, b) for a, b in zip(found[:2], out.hidden_states[1:3], strict=True))
    assert torch.equal(model.model.norm(found[2]), out.hidden_states[3])
    assert torch.equal(found[3], out.logits)


@pytest.fixture(scope="module")
def pruned(base, tmp_path_factory):
    """The base with half of every projection's entries gone."""
    model = tiny.load_merged(base, None)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p[p.abs() < p.abs().median()] = 0
    return tiny.save_model(model, tmp_path_factory.mktemp("pruned") / "model")


def spec_of(base, tmp_path, methods, **training) -> dict:
    rows = [{"prompt": f"{i} ", "completion": "abc" * (1 + i % 3)} for i in range(16)]
    write_rows(tmp_path / "a.jsonl", rows)
    settings = {"max_steps": 4, "batch_size": 8, "learning_rate": 0.003, "logging_steps": 1, "methods": methods}
    data = {"train": str(tmp_path / "a.jsonl"), "batches": "random"}
    return {"base": str(base), "data": data, "training": settings | training, "device": "cpu"}


def entries(folder) -> list[dict]:
    return [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "grad_norm" in e]


@pytest.mark.system("squarehead")
@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "galore"])
def test_zeros_stay_through_decay_and_momentum(base, pruned, tmp_path, optimizer):
    methods: list = [{"method": "squarehead", "teacher": str(base), "keep_zeros": True}]
    training: dict = {"weight_decay": 0.1, "optimizer": optimizer}
    if optimizer == "galore":
        methods.append({"method": "galore", "rank": 3})
        del training["optimizer"]
    spec = spec_of(pruned, tmp_path, methods, **training) | {"adapter": {"method": "full"}}
    folder = train(spec, tmp_path / "out", quiet=True).path
    before, after = load_file(pruned / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, value in before.items():
        if "proj" in name:
            assert torch.equal(after[name] == 0, value == 0), name
            assert not torch.equal(after[name], value)


@pytest.mark.system("squarehead")
def test_the_student_comes_nearer_to_its_teacher(base, pruned, tmp_path):
    methods = {"method": "squarehead", "teacher": str(base), "task": 0.0, "logits": 1.0, "keep_zeros": True}
    spec = spec_of(pruned, tmp_path, methods, max_steps=40) | {"adapter": {"method": "full"}}
    folder = train(spec, tmp_path / "out", quiet=True).path
    losses = [e["loss"] for e in entries(folder)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.system("squarehead")
def test_an_adapter_at_its_start_is_its_base_and_cuts_change_nothing(base, tmp_path):
    own = {"method": "squarehead", "logits": 1.0, "weight": 2.0}
    specs = [
        spec_of(base, tmp_path, ()),
        spec_of(base, tmp_path, own),
        spec_of(base, tmp_path, own, batch_size=2, gradient_accumulation_steps=4),
    ]
    # Micro-batches have ratios of their own; for an adapter that is its base all of them are 0.
    found = [entries(train(spec, tmp_path / str(i), quiet=True).path) for i, spec in enumerate(specs)]
    assert found[1][0]["loss"] == pytest.approx(found[0][0]["loss"], rel=1e-6)
    assert found[2][0]["loss"] == pytest.approx(found[0][0]["loss"], rel=1e-4)
    assert found[1][3]["loss"] > found[0][3]["loss"], "it is held back later"


def test_the_teachers_pass_leaves_alone_what_is_frozen():
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0].requires_grad_(False)
    spec = TrainSpec(base="x", data={"train": ["a"]})  # pyright: ignore[reportArgumentType]
    method = Squarehead(Squarehead.Params(), spec)
    method.teacher = model
    taught = method._taught({"input_ids": torch.arange(5)[None]})
    with torch.no_grad():
        assert torch.equal(taught[-1], tiny.llama()(torch.arange(5)[None]).logits), "the base without its adapter"
    assert [p.requires_grad for p in trained] == [False] + [True] * (len(trained) - 1)


def test_wrong_teachers_and_adapters_are_refused(base, tmp_path):
    other = tiny.save_model(tiny.llama(num_hidden_layers=2), tmp_path / "other")
    with pytest.raises(UnsupportedError, match="the teacher has other layers than the student"):
        train(spec_of(base, tmp_path, {"method": "squarehead", "teacher": str(other)}), tmp_path / "out", quiet=True)
    with pytest.raises(SpecError, match=r"methods\[0\].keep_zeros: an adapter changes no weight of the base"):
        train(spec_of(base, tmp_path, {"method": "squarehead", "keep_zeros": True}), tmp_path / "out", quiet=True)
