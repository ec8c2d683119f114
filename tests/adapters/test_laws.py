"""Laws that every adapter method keeps; each is run on the `EXAMPLE` that the method's own test declares."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import warnings

import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.adapters.laws import (
    IDS,
    Example,
    attach,
    bits,
    close,
    config_of,
    gpt2,
    grads,
    logits,
    randomise,
    same_bits,
    save,
)
from toolkit.adapters.config import peft_config
from toolkit.adapters.registration import METHODS
from toolkit.adapters.spec import AdapterSpec
from toolkit.adapters.train import train
from toolkit.data.rows import write_rows
from toolkit.errors import UnsupportedError
from toolkit.models.load import quiet_transformers
from toolkit.names import available

NAMES = available(METHODS)


def example(method: str) -> Example:
    return importlib.import_module(f"tests.adapters.methods.test_{method}").EXAMPLE


def folding(method: str) -> Example:
    found = example(method)
    if not found.folds:
        pytest.skip("no change of weights")
    return found


def trained(method: str, seed: int = 2, **fields) -> PeftModel:
    model = attach(tiny.llama(), method, **{**example(method).config, **fields})
    randomise(model, seed)
    return model


@pytest.mark.parametrize("method", NAMES)
class TestLaws:
    def test_config_is_documented_and_survives_its_file(self, method, tmp_path):
        config = config_of(method, **example(method).config)
        assert config.peft_type.value == method.upper()
        own = {f.name for f in dataclasses.fields(config)} - {f.name for f in dataclasses.fields(PeftConfig)}
        inherited = "\n".join(kind.__doc__ or "" for kind in type(config).__mro__)
        assert all(f"    {name}: " in inherited for name in own)
        config.save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict() | {"inference_mode": False}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("make", [tiny.llama, gpt2])
    def test_start_is_the_base(self, method, make, dtype):
        if not example(method).starts_at_base:
            pytest.skip("starts elsewhere, as its paper does")
        plain = logits(make().to(dtype))
        model = attach(make().to(dtype), method, **example(method).config)
        assert torch.equal(logits(model), plain)
        assert {v.dtype for v in model.parameters() if v.requires_grad} == {torch.float32}
        randomise(model)
        assert logits(model).dtype == dtype
        assert logits(model).isfinite().all()
        assert not torch.equal(logits(model), plain)

    def test_same_seed_same_start(self, method):
        one, other = (attach(tiny.llama(), method, **example(method).config) for _ in range(2))
        assert same_bits(bits(one), bits(other))

    def test_disabled_is_the_base(self, method):
        model = trained(method)
        changed = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny.llama()))
        assert torch.equal(logits(model), changed)

    def test_trained_parameters_by_formula(self, method):
        model = attach(tiny.llama(), method, **example(method).config)
        assert sum(v.numel() for v in model.parameters() if v.requires_grad) == example(method).count

    def test_gradients_reach_the_adapter_alone(self, method):
        model = trained(method)
        found = grads(model)
        assert set(found) == {name for name, value in model.named_parameters() if f"{method}_" in name}
        assert all(value.abs().max() > 0 for value in found.values())

    def test_training_lowers_the_loss_and_keeps_all_else(self, method):
        model = attach(tiny.llama(), method, **example(method).config)
        before = bits(model)
        trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
        optimizer = torch.optim.Adam(trainable.values(), lr=1e-2)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            losses.append(model(IDS, labels=IDS).loss)
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        kept = {name: value for name, value in bits(model).items() if name not in trainable}
        assert same_bits(kept, {name: before[name] for name in kept})

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_stock_peft_loads_the_same_bits(self, method, tmp_path, low_cpu_mem_usage):
        model = trained(method)
        folder = save(model, tmp_path)
        loaded = PeftModel.from_pretrained(tiny.llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert same_bits(bits(loaded), bits(model))
        torch.testing.assert_close(logits(loaded), logits(model))
        assert not any(value.requires_grad for value in loaded.parameters())

    @pytest.mark.parametrize("make", [tiny.llama, gpt2])
    def test_transformers_loads_the_same_bits(self, method, tmp_path, make):
        model = attach(make(), method, **example(method).config)
        randomise(model)
        folder = save(model, tmp_path)
        plain = make()
        with quiet_transformers():
            found = plain.load_adapter(str(folder))
        assert not found.missing_keys
        assert not found.unexpected_keys
        torch.testing.assert_close(logits(plain), logits(model))
        plain.delete_adapter("default")
        assert not any(f"{method}_" in name for name, _ in plain.named_parameters())

    def test_several_adapters_on_one_model(self, method, tmp_path):
        model = trained(method)
        first = logits(model)
        torch.manual_seed(1)  # as for the first adapter
        model.add_adapter("other", config_of(method, **example(method).config))
        assert torch.equal(logits(model), first)
        randomise(model, seed=7, adapter="other")
        model.set_adapter("other")
        second = logits(model)
        assert set(grads(model)) == {n for n, _ in model.named_parameters() if f"{method}_" in n and ".other" in n}
        assert torch.equal(second, logits(trained(method, seed=7)))
        model.set_adapter("default")
        assert torch.equal(logits(model), first)
        save(model, tmp_path)
        alone = PeftModel.from_pretrained(tiny.llama(), tmp_path / "other", adapter_name="other")
        alone.load_adapter(tmp_path, "default")
        assert torch.equal(logits(alone), second)
        alone.set_adapter("default")
        assert torch.equal(logits(alone), first)
        model.base_model.set_adapter(["default", "other"])
        both = logits(model)
        assert (both - first).abs().max() > 1e-3
        assert (both - second).abs().max() > 1e-3
        model.set_adapter("default")
        model.delete_adapter("other")
        assert torch.equal(logits(model), first)
        assert not any(".other" in name for name in model.state_dict())

    def test_unload_gives_the_base_back(self, method):
        model = trained(method).unload()
        assert same_bits(bits(model), bits(tiny.llama()))
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())

    def test_copy_is_a_model_of_its_own(self, method):
        model = trained(method)
        other = copy.deepcopy(model)
        assert torch.equal(logits(other), logits(model))
        randomise(other, seed=9)
        assert not torch.equal(logits(other), logits(model))
        assert torch.equal(logits(model), logits(trained(method)))

    def test_cache_gives_what_recomputing_gives(self, method):
        model = trained(method)
        with torch.no_grad():
            start = model(IDS[:, :5], use_cache=True)
            rest = model(IDS[:, 5:], past_key_values=start.past_key_values).logits
            parts = [start.logits, rest]
        close(torch.cat(parts, dim=1), logits(model))

    def test_checkpointing_gives_the_same_gradients(self, method):
        expected = grads(trained(method))
        model = trained(method)
        model.enable_input_require_grads()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 renames it
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        found = grads(model.train())
        assert found.keys() == expected.keys()
        for name, value in found.items():
            close(value, expected[name])

    @pytest.mark.parametrize("make", [tiny.llama, gpt2])
    def test_folded_is_attached(self, method, make):
        config = folding(method).config
        model = attach(make(), method, **config)
        randomise(model)
        model.add_adapter("other", config_of(method, **config))
        randomise(model, seed=5, adapter="other")
        before = bits(model)
        for names in (["default"], ["default", "other"]):
            model.base_model.set_adapter(names)
            attached = logits(model)
            model.merge_adapter(safe_merge=True)
            assert not same_bits(bits(model), before)
            close(logits(model), attached)
            with model.disable_adapter():
                assert torch.equal(logits(model), logits(make()))
            model.unmerge_adapter()
            assert same_bits(bits(model), before)
        folded = model.merge_and_unload()
        close(logits(folded), attached)
        assert not any(isinstance(module, BaseTunerLayer) for module in folded.modules())

    def test_one_after_another_folds_as_both_at_once(self, method):
        config = folding(method).config
        model = trained(method)
        model.add_adapter("other", config_of(method, **config))
        randomise(model, seed=5, adapter="other")
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="Already following adapters were merged"):
            model.merge_adapter(["other"])
        one_by_one = bits(model)
        model.unmerge_adapter()
        model.merge_adapter(["default", "other"])
        assert same_bits(bits(model), one_by_one)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_base_folds_to_its_rounding(self, method, dtype):
        folding(method)
        model = attach(tiny.llama().to(dtype), method, **example(method).config)
        randomise(model, strength=0.1)
        attached = logits(model).float()
        folded = model.merge_and_unload()
        assert {value.dtype for value in folded.parameters()} == {dtype}
        close(logits(folded).float(), attached, 20 * torch.finfo(dtype).eps)

    def test_what_cannot_be_folded_says_so_and_is_left_alone(self, method):
        if example(method).folds:
            pytest.skip("a change of weights")
        model = trained(method)
        before = bits(model)
        with pytest.raises(UnsupportedError, match=f"{method} adapters .* cannot be merged"):
            model.merge_and_unload()
        assert same_bits(bits(model), before)
        assert torch.equal(logits(model), logits(trained(method)))


@pytest.mark.parametrize("method", NAMES)
def test_a_spec_trains_it(method, base, tmp_path):
    """From YAML to a folder that stock PEFT reads, with the fields of the method and its defaults for the rest."""
    rows = [{"prompt": f"number {i} is ", "completion": str(i * 7 % 10)} for i in range(16)]
    write_rows(tmp_path / "train.jsonl", rows)
    spec = {
        "base": str(base),
        "adapter": {"method": method, **example(method).config},
        "data": {"train": str(tmp_path / "train.jsonl"), "packing": True, "max_length": 64},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1},
        "device": "cpu",
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    result = train(tmp_path / "spec.yaml", tmp_path / "out", quiet=True)
    assert result.numbers["trainable_parameters"] == example(method).count
    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(base)
        loaded = PeftModel.from_pretrained(plain, result.path)
    assert (
        sum(value.numel() for name, value in loaded.named_parameters() if f"{method}_" in name) == example(method).count
    )
    with loaded.disable_adapter():
        expected = logits(loaded)
    assert not torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("method", NAMES)
def test_fields_of_a_spec_are_checked(method):
    config, problems = peft_config(AdapterSpec(method=method, droput=0.1))
    assert config is None
    assert "has no field 'droput'" in str(problems[0])
    config, problems = peft_config(AdapterSpec(method=method))
    assert not problems
    assert config.to_dict() == config_of(method).to_dict()
