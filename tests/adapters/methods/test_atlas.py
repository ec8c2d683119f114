"""`atlas` against its base, its fine-tunes, and their sum put together by hand."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.adapters.laws import LAYERS, LINEARS, Example, attach, close, gpt2, logits, randomise, save
from toolkit.adapters.methods.atlas import AtlasConfig, AtlasLinear
from toolkit.merge.extract import extract

FOLDER = tempfile.TemporaryDirectory()  # that the laws find the fine-tunes wherever they run


def _lora_of_gpt2(folder: Path) -> Path:
    torch.manual_seed(5)
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True))
    randomise(model, seed=6)
    return save(model, folder)


def _full(seed: int) -> str:
    """A fine-tune of `tiny.llama()` and one of `gpt2()` in one folder: the laws run both with one configuration."""
    other = gpt2()
    generator = torch.Generator().manual_seed(seed)
    state = tiny.tuned(tiny.llama(), seed, scale=0.1).state_dict()
    state |= {n: v + torch.randn(v.shape, generator=generator) * 0.1 for n, v in other.named_parameters()}
    folder = ROOT / f"full{seed}"
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return str(folder)


ROOT = Path(FOLDER.name)
BASE = tiny.save_model(tiny.llama(), ROOT / "base")
LORA = str(tiny.save_lora(BASE, ROOT / "lora", seed=2))
GPT2 = str(_lora_of_gpt2(ROOT / "gpt2"))
BOTH = [_full(1), _full(2)]
EXAMPLE = Example({"vectors": BOTH}, count=LAYERS * len(LINEARS) * 2, is_lora=False)
LLAMA = [BOTH[0], LORA]


def layers(model: torch.nn.Module) -> list[AtlasLinear]:
    return [module for module in model.modules() if isinstance(module, AtlasLinear)]


def linear_changes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    start = tiny.llama().state_dict()
    return {n: state[n] - v for n, v in start.items() if n.endswith("proj.weight")}


@pytest.mark.system("atlas")
def test_composition_is_the_sum_put_together_by_hand():
    model = attach(tiny.llama(), "atlas", vectors=LLAMA)
    randomise(model)
    full = linear_changes(load_file(Path(LLAMA[0]) / "model.safetensors"))
    lora = linear_changes(tiny.load_merged(BASE, Path(LORA)).state_dict())
    plain = tiny.llama()
    coefficients = {n: v for n, v in model.named_parameters() if "atlas_coefficients" in n}
    assert len(coefficients) == LAYERS * len(LINEARS)
    with torch.no_grad():
        for name in full:
            key = f"base_model.model.{name.removesuffix('.weight')}.atlas_coefficients.default"
            c = coefficients[key]
            plain.get_parameter(name).add_(c[0] * full[name] + c[1] * lora[name])
    close(logits(model), logits(plain), 1e-5)
    assert (logits(model) - logits(tiny.llama())).abs().max() > 0.1


@pytest.mark.system("atlas")
def test_one_hot_coefficients_are_that_fine_tune():
    model = attach(tiny.llama(), "atlas", vectors=LLAMA)
    for layer in layers(model):
        layer.tensor("default", "coefficients").data = torch.tensor([0.0, 1.0])
    close(logits(model), logits(tiny.load_merged(BASE, Path(LORA))), 1e-5)


@pytest.mark.system("atlas")
def test_gradient_of_a_coefficient_is_an_inner_product():
    model = attach(tiny.llama(), "atlas", **EXAMPLE.config)
    plain, ids = tiny.llama(), torch.arange(12).reshape(2, 6)
    for module in (model, plain):
        module(ids, labels=ids).loss.backward()
    for layer, (_, gradient) in zip(layers(model), _gradients(plain), strict=True):
        expected = torch.einsum("oi,noi->n", gradient, layer.vectors["default"])
        close(layer.tensor("default", "coefficients").grad, expected, 1e-4)


def _gradients(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(n, v.grad) for n, v in model.named_parameters() if n.endswith("proj.weight") and v.grad is not None]


def test_the_checkpoint_holds_coefficients_alone(tmp_path):
    model = attach(tiny.llama(), "atlas", **EXAMPLE.config)
    stored = load_file(save(model, tmp_path) / "adapter_model.safetensors")
    assert sum(value.numel() for value in stored.values()) == EXAMPLE.count


def test_transposed_layers(tmp_path):
    model = attach(gpt2(), "atlas", vectors=[GPT2])
    for layer in layers(model):
        layer.tensor("default", "coefficients").data.fill_(1.0)
    lora = get_peft_model(gpt2(), LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True)).eval()
    lora.load_adapter(GPT2, "other")
    lora.set_adapter("other")
    close(logits(model), logits(lora), 1e-5)
    assert (logits(model) - logits(gpt2())).abs().max() > 0.1


def test_compressed_fine_tunes_and_linears_that_none_changed(tmp_path):
    tuned = tiny.save_model(tiny.tuned(tiny.llama(), 3), tmp_path / "tuned")
    few = tiny.save_lora(BASE, tmp_path / "few", target_modules=["q_proj"])
    extract(BASE, tuned, tmp_path / "small", kind="svd", rank="full", quiet=True)
    model = attach(tiny.llama(), "atlas", vectors=[str(few), f"{tmp_path / 'small'}#tuned"])
    counts = {layer.tensor("default", "coefficients").numel() for layer in layers(model)}
    assert counts == {1, 2}
    alone = attach(tiny.llama(), "atlas", vectors=[str(few)])
    assert sum(layer.has("default", "coefficients") for layer in layers(alone)) == LAYERS
    randomise(alone)
    attached = logits(alone)
    close(logits(alone.merge_and_unload()), attached, 1e-5)


def test_a_second_adapter_beside_a_merged_one():
    """Task vectors are taken from the base, and not from what it was merged to."""
    apart, merged = (attach(tiny.llama(), "atlas", vectors=LLAMA) for _ in range(2))
    for model in (apart, merged):
        randomise(model)
    apart.add_adapter("other", AtlasConfig(task_type="CAUSAL_LM", vectors=LLAMA))
    merged.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        merged.add_adapter("other", AtlasConfig(task_type="CAUSAL_LM", vectors=LLAMA))
    for one, other in zip(layers(apart), layers(merged), strict=True):
        assert torch.equal(one.vectors["other"], other.vectors["other"])
        assert torch.equal(one.vectors["other"], one.vectors["default"])


def test_fine_tunes_of_another_model(tmp_path):
    other = tiny.save_model(tiny.llama(intermediate_size=80), tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: the weight is \[80, 48\], and the model's \[96, 48\]"):
        attach(tiny.llama(), "atlas", vectors=[str(other)])


def test_no_vectors():
    with pytest.raises(ValueError, match="at least one fine-tune"):
        attach(tiny.llama(), "atlas")
    assert AtlasConfig().vectors == []
