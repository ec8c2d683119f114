"""`scaled_parallel` against hooks on a plain model, `parallel_adapter`, and PEFT's LoRA where it is one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.adapters.laws import HIDDEN, LAYERS, Example, attach, close, gpt2, logits, randomise
from tests.adapters.methods.test_bottleneck import hooked
from toolkit.adapters.methods._unified import UnifiedLayer
from toolkit.errors import UnsupportedError

SIZE = 6
EXAMPLE = Example(
    {"size": SIZE, "scale": 2.0}, LAYERS * (2 * HIDDEN * SIZE + SIZE + HIDDEN), folds=False, is_lora=False
)
AS_LORA = {"size": 4, "scale": 1.5, "activation": "identity", "biases": False, "target_modules": "all-linear"}


def layers(model: torch.nn.Module) -> list[UnifiedLayer]:
    return [m for m in model.modules() if isinstance(m, UnifiedLayer)]


@pytest.mark.system("unified_peft")
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_is_a_scaled_bottleneck_beside_the_sublayer(make):
    model = attach(make(), "scaled_parallel", size=SIZE, scale=4.0)
    randomise(model)
    close(logits(model), logits(hooked(make(), model, torch.relu, 4.0, parallel=True)[0]), 1e-6)


@pytest.mark.system("unified_peft")
def test_scale_one_is_the_parallel_adapter():
    models = [
        attach(tiny.llama(), "scaled_parallel", size=SIZE, scale=1.0),
        attach(tiny.llama(), "parallel_adapter", size=SIZE),
    ]
    for model in models:
        randomise(model)
    assert torch.equal(*map(logits, models))


@pytest.mark.system("unified_peft")
def test_beside_a_linear_without_activation_it_is_lora():
    model = attach(tiny.llama(), "scaled_parallel", **AS_LORA)
    randomise(model)
    lora = get_peft_model(tiny.llama(), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")).eval()
    for mine, other in zip(layers(model), [m for m in lora.modules() if hasattr(m, "lora_A")], strict=True):
        other.lora_A["default"].weight.data = mine.tensor("default", "down").data
        other.lora_B["default"].weight.data = mine.tensor("default", "up").data
    close(logits(model), logits(lora), 1e-6)
    attached = logits(model)
    close(logits(model.merge_and_unload()), attached)


def test_second_adapter_on_all_linears():
    from tests.adapters.laws import config_of

    model = attach(tiny.llama(), "scaled_parallel", **AS_LORA)
    model.add_adapter("other", config_of("scaled_parallel", **AS_LORA))
    assert all(layer.has("other", "down") for layer in layers(model))


def test_what_is_no_lora_says_so():
    for fields in ({"activation": "relu"}, {"biases": True}):
        model = attach(tiny.llama(), "scaled_parallel", **(AS_LORA | fields))
        with pytest.raises(UnsupportedError, match="cannot be written as LoRA here"):
            layers(model)[0].low_rank("default")
        with pytest.raises(UnsupportedError, match=r"q_proj: scaled_parallel adapters .* cannot be merged"):
            model.merge_and_unload()
