"""Weights as transformers 5 has them in memory, and as released checkpoints have them, in one merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from toolkit.checkpoints.reader import open_checkpoint
from toolkit.checkpoints.released import by_released_names
from toolkit.errors import SpecError
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


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> dict[str, str]:
    """GPT-2 as the hub has it, without the first word of its names, and a LoRA and a fine-tune by PEFT's names."""
    root = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with quiet_transformers():
        model.save_pretrained(root / "base")
    state = load_file(root / "base" / "model.safetensors")
    assert "transformer.h.0.attn.c_attn.weight" in state
    save_file({n.removeprefix("transformer."): v for n, v in state.items()}, root / "base" / "model.safetensors")
    config = LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    lora = get_peft_model(model, config)
    lora.save_pretrained(root / "lora")
    with quiet_transformers():
        lora.merge_and_unload().save_pretrained(root / "tuned")
    return {name: str(root / name) for name in ("base", "lora", "tuned")}


def test_names_without_their_first_word(gpt2, tmp_path):
    tuned = load_file(Path(gpt2["tuned"]) / "model.safetensors")
    spec = {"merge_method": "task_arithmetic", "base_model": gpt2["base"], "dtype": "float32"}
    for i, model in enumerate((gpt2["lora"], gpt2["tuned"], f"{gpt2['base']}+{gpt2['lora']}")):
        merge(spec | {"models": [{"model": model}]}, tmp_path / str(i), quiet=True)
        got = load_file(tmp_path / str(i) / "model.safetensors")
        assert got.keys() == tuned.keys()
        for name, value in tuned.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    linear = {"merge_method": "linear", "models": [{"model": gpt2[n]} for n in ("base", "tuned")]}
    merge(linear | {"parameters": {"weight": 1}}, tmp_path / "linear", quiet=True)
    assert load_file(tmp_path / "linear" / "model.safetensors").keys() == tuned.keys()
    with quiet_transformers():
        GPT2LMHeadModel.from_pretrained(tmp_path / "linear")


def test_other_names_are_still_an_error(gpt2, models):
    inputs = [{"model": gpt2["base"], "parameters": {"weight": 1}}, {"model": models["a-released"]}]
    with pytest.raises(SpecError, match=r"models\[1\].model: lacks"):
        make_plan({"merge_method": "linear", "models": inputs, "parameters": {"weight": 1}})
