"""LoRA folders mean what PEFT makes of them: base plus delta equals PEFT's merged weights, for every kind."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tests import tiny
from toolkit.checkpoints.adapters import CONFIG, WEIGHTS, open_adapter
from toolkit.checkpoints.deltas import AdaptedCheckpoint, AdapterDelta, chunks
from toolkit.checkpoints.reader import Checkpoint, open_checkpoint
from toolkit.errors import CheckpointError, MissingError, UnsupportedError


def values(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read a tensor the way a merge does, chunk by chunk."""
    info = checkpoint.info(name)
    out = np.empty(info.count, np.float32)
    for start, stop in chunks(info.shape):
        checkpoint.read(name, start, stop, out[start:stop])
    return torch.from_numpy(out).reshape(info.shape)


def check_against_peft(base: Path, folder: Path) -> None:
    merged = tiny.load_merged(base, folder).state_dict()
    adapted = AdaptedCheckpoint(AdapterDelta(open_checkpoint(base), open_adapter(folder)))
    plain = open_checkpoint(base)
    changed = 0
    for name in adapted.tensors:
        expected = merged[name]
        torch.testing.assert_close(values(adapted, name), expected, rtol=1e-5, atol=1e-5)
        if adapted.delta.touches(name):
            changed += 1
            assert (values(plain, name) - expected).abs().max() > 1e-3, f"{name} should have been changed"
        else:
            assert adapted.read_raw(name).tobytes() == plain.read_raw(name).tobytes()
    assert changed


@pytest.mark.parametrize("kind", ["plain", "wide", "few", "rslora", "dora", "patterns"])
def test_delta_equals_peft(kind, base, loras):
    check_against_peft(base, loras[kind])


SPECIAL = {
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora with patterns": {"use_dora": True, "rank_pattern": {"k_proj": 2}, "use_rslora": True},
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_delta_equals_peft_on_other_modules(kind, base, tmp_path):
    check_against_peft(base, tiny.save_lora(base, tmp_path / "lora", seed=3, **SPECIAL[kind]))


@pytest.mark.parametrize("dora", [False, True])
def test_delta_of_transposed_weights_equals_peft(dora, tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=60, n_positions=32)).eval()
    tiny.save_model(model, tmp_path / "base")
    config = LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=dora)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora" in name:
                value.copy_(torch.rand_like(value))
    adapted.save_pretrained(tmp_path / "lora")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, str(tmp_path / "lora")).merge_and_unload().state_dict()
    ours = AdaptedCheckpoint(AdapterDelta(open_checkpoint(tmp_path / "base"), open_adapter(tmp_path / "lora")))
    for name in ours.tensors:
        torch.testing.assert_close(values(ours, name), merged[name], rtol=1e-5, atol=1e-5)


def test_delta_does_not_depend_on_the_slices_that_are_read(tmp_path):
    model = tiny.llama(hidden_size=320, intermediate_size=640, num_attention_heads=4)
    base = tiny.save_model(model, tmp_path / "base")
    delta = AdapterDelta(open_checkpoint(base), open_adapter(tiny.save_lora(base, tmp_path / "lora")))
    name = "model.layers.0.mlp.up_proj.weight"
    pair = delta.adapter.low_rank("model.layers.0.mlp.up_proj")
    expected = pair.scale * pair.rows.astype(np.float64) @ pair.cols.astype(np.float64)
    info = delta.base.info(name)
    assert len(list(chunks(info.shape))) > 1
    for start, stop in chunks(info.shape):
        out = np.empty(stop - start, np.float32)
        delta.read(name, start, stop, np.zeros(stop - start, np.float32), out)
        np.testing.assert_allclose(out, expected.reshape(-1)[start:stop], rtol=1e-4, atol=1e-5)


def test_content_hash_is_of_what_the_adapter_computes(base, loras, tmp_path):
    original = open_adapter(loras["plain"]).content_hash
    copy = tmp_path / "copy"
    shutil.copytree(loras["plain"], copy)
    config = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere", "peft_version": "9"}))
    assert open_adapter(copy).content_hash == original
    (copy / CONFIG).write_text(json.dumps(config | {"lora_alpha": 99}))
    assert open_adapter(copy).content_hash != original
    assert open_adapter(tiny.save_lora(base, tmp_path / "other", seed=9)).content_hash != original


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"use_qalora": True}, "uses use_qalora"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(change, message, loras, tmp_path):
    shutil.copytree(loras["plain"], tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedError, match=message):
        open_adapter(tmp_path / "a")


def test_missing_half_of_a_pair(base, loras, tmp_path):
    from safetensors.torch import load_file

    shutil.copytree(loras["few"], tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    victim = next(name for name in tensors if "lora_B" in name)
    del tensors[victim]
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lacks lora_B"):
        open_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": "x"}, "lora_alpha: expected a number above 0, got 'x'"),
        ({"lora_alpha": None}, "lora_alpha: expected a number above 0, got None"),
        ({"lora_alpha": True}, "lora_alpha: expected a number above 0, got True"),
        ({"lora_alpha": 0}, "lora_alpha: expected a number above 0, got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a number above 0, got nan"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern: '(' is not a regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected names of modules and their values, got [1]"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: 'q_proj': expected a number above 0, got 'x'"),
        ({"rank_pattern": "q"}, "rank_pattern: expected names of modules and their values, got 'q'"),
    ],
)
def test_settings_that_no_scale_can_be_computed_from(change, message, loras, tmp_path):
    shutil.copytree(loras["plain"], tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError) as caught:
        open_adapter(tmp_path / "a")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


PAIRS = {
    "other ranks": ("lora_A.weight", zeros(4, 512), "lora_B.weight", zeros(192, 8)),
    "vector": ("lora_A.weight", zeros(4), "lora_B.weight", zeros(192, 4)),
    "rank 0": ("lora_A.weight", zeros(0, 512), "lora_B.weight", zeros(192, 0)),
    "convolution": ("lora_A.weight", zeros(4, 5, 3, 3), "lora_B.weight", zeros(7, 4, 1, 1)),
    "embedding": ("lora_embedding_A", zeros(4, 512), "lora_embedding_B", zeros(192, 5)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_that_do_not_multiply(case, loras, tmp_path):
    a, first, b, second = PAIRS[case]
    shutil.copytree(loras["plain"], tmp_path / "a")
    save_file({f"base_model.model.m.{a}": first, f"base_model.model.m.{b}": second}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        open_adapter(tmp_path / "a")
    assert f"module m: A is {list(first.shape)} and B is {list(second.shape)}" in str(caught.value)


def test_parts_of_other_kinds(loras, tmp_path):
    shutil.copytree(loras["dora"], tmp_path / "a")
    good = {"base_model.model.m.lora_A.weight": zeros(4, 6), "base_model.model.m.lora_B.weight": zeros(9, 4)}
    for name, value, message in [
        ("base_model.model.m.lora_A.weight", zeros(4, 6, dtype=torch.int8), "expected floats, got I8"),
        ("base_model.model.m.lora_magnitude_vector", zeros(6), "6 magnitudes for 9 outputs"),
    ]:
        save_file(good | {name: value}, tmp_path / "a" / WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            open_adapter(tmp_path / "a")


@pytest.mark.parametrize("kind", ["plain", "dora", "patterns"])
def test_shape_is_that_of_the_product(kind, loras):
    with closing(open_adapter(loras[kind])) as adapter:
        for module in adapter.parts:
            assert adapter.shape(module) == adapter.low_rank(module).shape


def test_adapter_of_another_base(loras, tmp_path):
    other = tiny.save_model(tiny.llama(hidden_size=32), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"changes model\.layers\.0.* as \[.*\], but in .* it is \["):
        AdapterDelta(open_checkpoint(other), open_adapter(loras["plain"]))
    shallow = tiny.save_model(tiny.llama(num_hidden_layers=1), tmp_path / "shallow")
    with pytest.raises(CheckpointError, match=r"which .*shallow does not have"):
        AdapterDelta(open_checkpoint(shallow), open_adapter(loras["plain"]))


def test_no_adapter_there(tmp_path, loras):
    with pytest.raises(MissingError, match=r"no adapter_config\.json"):
        open_adapter(tmp_path)
    shutil.copy(loras["plain"] / CONFIG, tmp_path / CONFIG)
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        open_adapter(tmp_path)
