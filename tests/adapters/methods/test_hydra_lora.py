"""`hydra_lora` against its formula in float64, PEFT's LoRA, and the weights and biases of the paper's merge."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.adapters.laws import LAYERS, LINEARS, Example, attach, close, gpt2, logits, randomise
from toolkit.adapters.methods.hydra_lora import HydraConfig, HydraLinear
from toolkit.errors import UnsupportedError

FIELDS = {"parallel_rank": 3, "sequential_rank": 2, "scale": 0.5}
EXAMPLE = Example(FIELDS, count=LAYERS * sum(3 * (i + o) + 2 * (o + o) for i, o in LINEARS.values()))


def layers(model: torch.nn.Module) -> list[HydraLinear]:
    return [m for m in model.modules() if isinstance(m, HydraLinear)]


def test_count_by_formula():
    """`parallel_rank (in + out) + sequential_rank (out + out)` for each linear, summed by hand."""
    assert EXAMPLE.count == 3 * (3 * 2 * 48 + 3 * 2 * 72 + 3 * 96 + 3 * 3 * 144 + 2 * 2 * (48 * 3 + 24 * 2 + 96 * 2))


@pytest.mark.system("hydra_lora")
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_merged_weight_and_bias_are_those_of_the_paper(make):
    model = attach(make(), "hydra_lora", **FIELDS).double()
    randomise(model)
    for layer in layers(model)[:4]:
        w0, b0 = layer.base_layer.weight.detach(), layer.base_layer.bias
        w0 = w0 if make is tiny.llama else w0.T
        w_p = layer.hydra_lora_parallel_b["default"] @ layer.hydra_lora_parallel_a["default"]
        w_s = layer.hydra_lora_sequential_b["default"] @ layer.hydra_lora_sequential_a["default"]
        weight = w0 + 0.5 * (w_p + w_s @ w0)
        bias = 0 if b0 is None else b0 + 0.5 * w_s @ b0
        x = torch.randn(5, w0.shape[1], dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ weight.T + bias, rtol=1e-12, atol=1e-12)
        change = layer.fold("default")
        close(change.weight.double(), (weight - w0).detach())
        assert (change.bias is None) == (b0 is None)
        if change.bias is not None:
            close(change.bias.double(), (bias - b0).detach())


@pytest.mark.system("hydra_lora")
def test_sequential_branch_off_is_lora():
    model = attach(tiny.llama(), "hydra_lora", parallel_rank=3, sequential_rank=0, scale=2.0)
    randomise(model)
    lora = get_peft_model(tiny.llama(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")).eval()
    for mine, other in zip(layers(model), [m for m in lora.modules() if hasattr(m, "lora_A")], strict=True):
        other.lora_A["default"].weight.data = mine.hydra_lora_parallel_a["default"].data
        other.lora_B["default"].weight.data = mine.hydra_lora_parallel_b["default"].data
    close(logits(model), logits(lora), 1e-6)


@pytest.mark.system("hydra_lora")
def test_over_an_identity_the_branches_are_alike():
    base = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False))
    base[0].weight.data = torch.eye(6)
    outputs = []
    for branch, ranks in (("parallel", (2, 0)), ("sequential", (0, 2))):
        from peft import inject_adapter_in_model

        model = inject_adapter_in_model(
            HydraConfig(parallel_rank=ranks[0], sequential_rank=ranks[1], target_modules=["0"]),
            torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False)),
        )
        model[0].base_layer.weight.data = torch.eye(6)
        generator = torch.Generator().manual_seed(0)
        for part in "ab":
            value = getattr(model[0], f"hydra_lora_{branch}_{part}")["default"]
            value.data = torch.randn(value.shape, generator=generator)
        outputs.append(model(torch.arange(12.0).reshape(2, 6)))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], torch.arange(12.0).reshape(2, 6))


@pytest.mark.system("hydra_lora")
def test_unmerging_gives_the_original_bits_where_inverting_does_not():
    model = attach(tiny.llama(), "hydra_lora", **FIELDS)
    randomise(model)
    layer = layers(model)[0]
    original = layer.base_layer.weight.data.clone()
    b, a = layer.hydra_lora_sequential_b["default"].data, layer.hydra_lora_sequential_a["default"].data
    w_p = layer.hydra_lora_parallel_b["default"].data @ layer.hydra_lora_parallel_a["default"].data
    model.merge_adapter()
    inverted = torch.linalg.solve(torch.eye(48) + 0.5 * b @ a, layer.base_layer.weight.data - 0.5 * w_p)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.data, original)
    close(inverted, original, 1e-4)
    assert not torch.equal(inverted, original)


@pytest.mark.system("hydra_lora")
def test_change_belongs_to_its_base():
    changes = []
    for seed in (0, 1):
        model = attach(tiny.llama(seed), "hydra_lora", **FIELDS)
        randomise(model)
        changes.append(layers(model)[0].fold("default").weight)
    assert (changes[0] - changes[1]).abs().max() > 0.1


def test_biases_are_no_part_of_lora():
    model = attach(gpt2(), "hydra_lora", **FIELDS)
    with pytest.raises(UnsupportedError, match="changes biases too"):
        layers(model)[0].low_rank("default")
    assert layers(attach(gpt2(), "hydra_lora", sequential_rank=0))[0].low_rank("default").a.shape == (4, 48)


@pytest.mark.parametrize("fields", [{"parallel_rank": 0, "sequential_rank": 0}, {"parallel_rank": -1}])
def test_wrong_fields(fields):
    with pytest.raises(ValueError, match="at least 0"):
        HydraConfig(**fields)
