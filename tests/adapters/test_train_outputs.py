"""What is made of a finished adapter is what PEFT makes of it; what cannot be made is refused before the first step."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import toolkit
from toolkit.adapters import callbacks
from toolkit.adapters.train import train
from toolkit.checkpoints.adapters import open_adapter
from toolkit.data.rows import write_rows
from toolkit.errors import OutputError, SpecError, UnsupportedError

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def spec_of(base, folder, after, adapter) -> dict:
    write_rows(folder / "rows.jsonl", [{"prompt": f"{i} ", "completion": "yes"} for i in range(8)])
    training = {"max_steps": 3, "learning_rate": 0.05}
    data = {"train": str(folder / "rows.jsonl")}
    return {"base": str(base), "adapter": adapter, "data": data, "training": training, "device": "cpu", "after": after}


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("adapter", [{"method": "lora", "r": 2}, {"method": "ia3"}, {"method": "mos", "r": 2}])
def test_merged_model_and_served_folder_are_the_adapter(adapter, base, tmp_path):
    after = {"merge": str(tmp_path / "merged"), "serve": str(tmp_path / "served")}
    result = train(spec_of(base, tmp_path, after, adapter), tmp_path / "mine", quiet=True)
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(result.path))
    merged = toolkit.load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(merged.model), logits(own), rtol=1e-4, atol=1e-4)
    assert merged.tokenizer.chat_template
    assert [p.name for p in (tmp_path / "served").iterdir()] == ["mine"]
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "served" / "mine"))
    assert torch.equal(logits(served), logits(own))
    assert result.numbers["after"] == {"merge": str(tmp_path / "merged"), "serve": str(tmp_path / "served" / "mine")}


def test_method_that_is_one_lora_is_written_as_such(base, tmp_path):
    after = {"lora": str(tmp_path / "lora")}
    result = train(spec_of(base, tmp_path, after, {"method": "mos", "r": 2}), tmp_path / "mine", quiet=True)
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(result.path))
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora"))
    assert open_adapter(tmp_path / "lora").base_model == str(base)
    torch.testing.assert_close(logits(lora), logits(own), rtol=1e-4, atol=1e-4)


def test_model_in_memory_stays_as_it_is(base, tmp_path):
    loaded = toolkit.load_model(base)
    before = logits(loaded.model)
    spec = spec_of(base, tmp_path, {"merge": str(tmp_path / "merged")}, {"r": 2})
    train(spec | {"base": (loaded.model, loaded.tokenizer)}, tmp_path / "mine", quiet=True)
    assert torch.equal(logits(loaded.model), before)
    assert not torch.equal(logits(toolkit.load_model(tmp_path / "merged").model), before)


@pytest.mark.parametrize(
    ("after", "adapter", "message"),
    [
        ("merge", {"method": "prefix_tuning", "num_virtual_tokens": 2}, "prefix_tuning changes no weights"),
        ("lora", {"method": "lora"}, "lora is no method of the toolkit that is one LoRA exactly"),
        ("lora", {"method": "ia3"}, "ia3 is no method of the toolkit that is one LoRA exactly"),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_first_step(after, adapter, message, base, tmp_path):
    with pytest.raises(UnsupportedError, match=f"after.{after}: {message}"):
        train(spec_of(base, tmp_path, {after: str(tmp_path / "made")}, adapter), tmp_path / "mine", quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_outputs_that_exist_are_refused_before_the_first_step(base, tmp_path):
    (tmp_path / "served" / "mine").mkdir(parents=True)
    (tmp_path / "served" / "mine" / "file").write_text("x")
    spec = spec_of(base, tmp_path, {"serve": str(tmp_path / "served")}, {"r": 2})
    with pytest.raises(OutputError, match="mine: exists already"):
        train(spec, tmp_path / "mine", quiet=True)
    spec["after"]["overwrite"] = True
    train(spec, tmp_path / "mine", quiet=True)
    assert not (tmp_path / "served" / "mine" / "file").exists()
    with pytest.raises(SpecError, match="after needs an adapter"):
        train(spec | {"adapter": {"method": "full"}}, tmp_path / "other", quiet=True)


def test_few_bits_need_a_gpu_and_bitsandbytes(base, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    spec = spec_of(base, tmp_path, {}, {"r": 2}) | {"quantization": "nf4"}
    with pytest.raises(SpecError, match="quantization: nf4 needs a GPU, and there is none"):
        train(spec, tmp_path / "mine", quiet=True)
    with pytest.raises(SpecError, match="quantization needs an adapter on a pretrained base"):
        train(spec | {"adapter": {"method": "full"}}, tmp_path / "mine", quiet=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_peak_memory_is_that_of_this_process(monkeypatch):
    """`getrusage` gives the parent's where that was larger, such as a notebook's that starts a training."""
    monkeypatch.setattr(callbacks.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=1 << 40))
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert now <= callbacks.peak_memory() < 1 << 40
