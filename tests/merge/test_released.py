"""Weights as transformers 5 has them in memory, and as released checkpoints have them, in one merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from toolkit.checkpoints.reader import open_checkpoint
from toolkit.checkpoints.released import by_released_names
from toolkit.merge.plan import make_plan
from toolkit.merge.run import merge
from toolkit.models.load import quiet_transformers


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Any]:
    """Two mixtures of experts, each in memory, as a released checkpoint, and as it is in memory on disk."""
    root = tmp_path_factory.mktemp("released")
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    found: dict[str, Any] = {}
    for i, name in enumerate(("a", "b")):
        torch.manual_seed(i)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).to(torch.bfloat16)
        found[name] = model
        with quiet_transformers():
            model.save_pretrained(root / f"{name}-released")
            model.save_pretrained(root / f"{name}-fused", save_original_format=False)
        found[f"{name}-released"] = str(root / f"{name}-released")
        found[f"{name}-fused"] = str(root / f"{name}-fused")
    return found


def merged(a: Any, b: Any, out: Path) -> dict[str, torch.Tensor]:
    inputs = [{"model": a, "parameters": {"weight": 0.3}}, {"model": b, "parameters": {"weight": 0.7}}]
    with open_checkpoint(merge({"merge_method": "linear", "models": inputs}, out, quiet=True).path) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


@pytest.mark.parametrize(("a", "b"), [("a", "b-released"), ("a-fused", "b-released"), ("a-released", "b-fused")])
def test_forms_may_be_mixed(a, b, models, tmp_path):
    expected = merged(models["a-released"], models["b-released"], tmp_path / "expected")
    got = merged(models[a], models[b], tmp_path / "got")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    with quiet_transformers():
        MixtralForCausalLM.from_pretrained(tmp_path / "got")


def test_deltas_of_one_form_from_a_base_of_the_other(models, tmp_path):
    spec = {"merge_method": "task_arithmetic", "base_model": models["a-released"], "parameters": {"weight": 0.5}}
    for name in ("b-released", "b-fused"):
        merge(spec | {"models": [{"model": models[name]}]}, tmp_path / name, quiet=True)
    with open_checkpoint(tmp_path / "b-released") as a, open_checkpoint(tmp_path / "b-fused") as b:
        assert all(np.array_equal(a.read_raw(name), b.read_raw(name)) for name in a.tensors)


def test_equal_forms_stay_as_they_are(models, tmp_path):
    """Two fused checkpoints need no conversion, and none is made."""
    got = merged(models["a-fused"], models["b-fused"], tmp_path / "out")
    assert "model.layers.0.mlp.experts.gate_up_proj" in got


def test_slices_of_what_was_fused(models):
    with open_checkpoint(models["a-fused"]) as fused, open_checkpoint(models["a-released"]) as released:
        view = by_released_names(fused)
        assert view is not None
        assert {n: i.shape for n, i in view.tensors.items()} == {n: i.shape for n, i in released.tensors.items()}
        name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
        assert np.array_equal(view.read_raw(name, 16, 48), released.read_raw(name, 16, 48))
        assert by_released_names(released) is None
    plan = make_plan(
        {
            "merge_method": "linear",
            "models": [{"model": models[name], "parameters": {"weight": 1}} for name in ("a-fused", "b-released")],
        }
    )
    assert plan.memory_bytes > 2 * 3 * 48 * 16
    plan.inputs.close()
