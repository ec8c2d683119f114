"""What is folded computes what was attached, with stock PEFT and in the toolkit's own reader."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model

from tests import tiny
from tests.adapters.laws import attach, bits, close, config_of, gpt2, logits, randomise, same_bits
from tests.adapters.test_laws import NAMES, example
from toolkit.adapters.fold import fold
from toolkit.checkpoints.adapters import open_adapter
from toolkit.errors import OutputError, UnsupportedError

LINEAR = {"size": 4, "activation": "identity", "biases": False, "target_modules": "all-linear", "scale": 0.7}
CASES = [
    ("mos", tiny.llama, {"r": 4}),
    ("mos", gpt2, {"r": 4}),
    ("hydra_lora", tiny.llama, {"scale": 0.3}),
    ("hydra_lora", gpt2, {"sequential_rank": 0, "scale": 0.3}),
    ("scaled_parallel", tiny.llama, LINEAR),
    ("scaled_parallel", gpt2, LINEAR),
    ("bottleneck", tiny.llama, LINEAR),
    ("dsee", gpt2, {"r": 3, "num_sparse": 0}),
]


@pytest.mark.parametrize(("method", "make", "fields"), CASES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_folded_is_attached(method, make, fields, tmp_path):
    model = attach(make(), method, **fields)
    randomise(model)
    before = bits(model)
    folder = fold(model, tmp_path / "lora")
    assert same_bits(bits(model), before)
    loaded = PeftModel.from_pretrained(make(), folder)
    assert type(loaded.peft_config["default"]) is LoraConfig
    close(logits(loaded), logits(model))
    assert (logits(model) - logits(make())).abs().max() > 0.05
    with closing(open_adapter(folder)) as ours:
        assert len(ours.parts) == len([n for n in before if n.endswith("base_layer.weight")])


@pytest.mark.parametrize("method", [name for name in NAMES if not example(name).is_lora])
def test_what_is_no_lora_is_refused_and_nothing_is_written(method, tmp_path):
    model = attach(tiny.llama(), method, **example(method).config)
    with pytest.raises(UnsupportedError, match="cannot be written as LoRA"):
        fold(model, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [name for name in NAMES if example(name).is_lora])
def test_examples_fold(method, tmp_path):
    model = attach(tiny.llama(), method, **example(method).config)
    randomise(model)
    close(logits(PeftModel.from_pretrained(tiny.llama(), fold(model, tmp_path / "lora"))), logits(model))


def test_ranks_that_differ_and_modules_that_are_stored_whole(tmp_path):
    fields = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    model = attach(tiny.llama(), "hydra_lora", **fields)
    randomise(model)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.put("default", "parallel_a", torch.cat([layer.tensor("default", "parallel_a").data] * 2))
    layer.put("default", "parallel_b", torch.cat([layer.tensor("default", "parallel_b").data] * 2, dim=1))
    loaded = PeftModel.from_pretrained(tiny.llama(), fold(model, tmp_path / "lora"))
    close(logits(loaded), logits(model))
    assert loaded.peft_config["default"].rank_pattern == {"model.layers.1.mlp.down_proj": 12}


def test_one_of_several_adapters(tmp_path):
    model = attach(tiny.llama(), "hydra_lora")
    model.add_adapter("other", config_of("hydra_lora", target_modules=["q_proj"]))
    randomise(model, adapter="other")
    loaded = PeftModel.from_pretrained(tiny.llama(), fold(model, tmp_path / "lora", adapter="other"))
    model.set_adapter("other")
    close(logits(loaded), logits(model))


def test_mistakes(tmp_path):
    model = attach(tiny.llama(), "hydra_lora")
    with pytest.raises(ValueError, match="a task is for POLY adapters; this one is HYDRA_LORA"):
        fold(model, tmp_path / "lora", task=1)
    poly = get_peft_model(tiny.llama(), PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="name one, or 'unknown'"):
        fold(poly, tmp_path / "lora")
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match="LORA is no method of the toolkit"):
        fold(lora, tmp_path / "lora")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "file").touch()
    with pytest.raises(OutputError):
        fold(model, tmp_path / "lora")
