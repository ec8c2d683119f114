"""Attention never runs twice, and the gradients stay."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.allocated import held_bytes
from tests import tiny
from toolkit.adapters.train import train
from toolkit.adapters.training.lightseq import attention_kept
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError, UnsupportedError


class Kernels(TorchDispatchMode):
    """Counts forward passes of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.count += "scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def passes(model) -> tuple[int, int, list[torch.Tensor]]:
    """Return attention's forward passes in the forward and in the backward pass, and the gradients."""
    model.zero_grad()
    with Kernels() as forward:
        loss = model(**batch()).loss
    with Kernels() as backward:
        loss.backward()
    return forward.count, backward.count, [p.grad.clone() for p in model.parameters()]


@pytest.mark.system("lightseq")
def test_attention_runs_once_and_the_gradients_are_equal():
    model = tiny.llama().train()
    plain = passes(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    ordinary = passes(model)
    model.activation_checkpointing_disable()
    with attention_kept(model):
        placed = passes(model)
    assert (plain[:2], ordinary[:2], placed[:2]) == ((3, 0), (3, 3), (3, 0))
    assert all(torch.equal(a, b) for a, b in zip(placed[2], plain[2], strict=True))
    assert passes(model)[:2] == (3, 0), "the model is as it was"


@pytest.mark.system("lightseq")
def test_what_is_kept_more_is_a_hidden_state_and_the_sums_of_every_layer():
    model = tiny.llama().train()
    with attention_kept(model):
        placed = held_bytes(lambda: model(**batch()).loss)
    model.activation_checkpointing_enable({"use_reentrant": False})
    ordinary = held_bytes(lambda: model(**batch()).loss)
    model.activation_checkpointing_disable()
    hidden, sums = 2 * 40 * 48 * 4, 2 * 4 * 40 * 4
    assert placed - ordinary == pytest.approx(3 * (hidden + sums), rel=0.05)


@pytest.mark.system("lightseq")
def test_a_run_takes_the_same_steps(base, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i} ", "completion": "yes"} for i in range(8)])
    files = []
    for i, methods in enumerate(((), "lightseq")):
        training = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01, "methods": methods}
        spec = {"base": str(base), "adapter": {"method": "lora", "lora_dropout": 0.2}, "training": training}
        folder = train(
            spec | {"data": {"train": str(tmp_path / "a.jsonl")}, "device": "cpu"}, tmp_path / str(i), quiet=True
        )
        files.append((folder.path / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1], "dropout is drawn again as it was"


def test_eager_attention_is_refused():
    model = tiny.llama()
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match="lightseq needs a decoder of transformers with sdpa attention"):
        attention_kept(model).__enter__()


def test_two_ways_to_keep_less_are_refused(base, tmp_path):
    spec = {"base": str(base), "data": {"train": "a"}, "training": {"methods": ["streambp", "lightseq"]}}
    with pytest.raises(SpecError, match=r"methods\[1\]: streambp keeps less than lightseq already"):
        train(spec, tmp_path / "out", quiet=True)
