"""Adapters of other types as LoRA, as stock PEFT computes both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model

from tests import tiny
from tests.adapters.laws import attach, close, config_of, gpt2, logits, randomise, save
from tests.adapters.methods.test_scalearn import lora
from toolkit.adapters.convert import convert_adapter, fold_adapter, load_adapted
from toolkit.cli import main
from toolkit.errors import CheckpointError, MissingError, OutputError, SpecError, UnsupportedError

KINDS = {
    "loha": {"r": 2, "target_modules": "all-linear"},
    "lokr": {"r": 2, "target_modules": "all-linear"},
    "ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "oft": {"oft_block_size": 12, "target_modules": "all-linear"},
    "vera": {"r": 4, "target_modules": ["q_proj"]},
    "mos": {"r": 4},
    "dsee": {"r": 2, "num_sparse": 10},
    "hydra_lora": {},
    "scalearn": {"sources": {"one": lora(2), "two": lora(3)}},
}


def saved(base: Path, folder: Path, method: str, **fields) -> tuple[str, torch.Tensor]:
    model = attach(tiny.llama(), method, **fields)
    randomise(model, strength=0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    return str(save(model, folder)), logits(model)


@pytest.mark.parametrize("method", KINDS)
def test_full_rank_is_exact_for_peft(base, tmp_path, method):
    folder, expected = saved(base, tmp_path / "a", method, **KINDS[method])
    result = convert_adapter(folder, tmp_path / "lora", rank=96, quiet=True)
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    assert type(model.peft_config["default"]) is LoraConfig
    close(logits(model), expected, 5e-5)
    assert max(result.numbers["relative_error"].values()) < 1e-5
    assert result.numbers["from"] == method.upper()


def test_lower_ranks_are_the_best_of_their_rank(base, tmp_path):
    folder, _ = saved(base, tmp_path / "a", "loha", **KINDS["loha"])
    convert_adapter(folder, tmp_path / "lora", rank=2, quiet=True)
    source = load_adapted(folder).get_base_model()
    target = load_adapted(tmp_path / "lora").get_base_model()
    for name, layer in source.named_modules():
        if hasattr(layer, "get_delta_weight") and name:
            u, s, v = torch.linalg.svd(layer.get_delta_weight("default").detach().double())
            best = (u[:, :2] * s[:2]) @ v[:2]
            close(target.get_submodule(name).get_delta_weight("default").detach().double(), best, 1e-4)


def test_energy(base, tmp_path):
    folder, _ = saved(base, tmp_path / "a", "dsee", r=2, num_sparse=0)
    convert_adapter(folder, tmp_path / "lora", energy=0.999999, quiet=True)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 2


def test_dora_becomes_lora(base, loras, tmp_path):
    convert_adapter(loras["dora"], tmp_path / "lora", rank=48, quiet=True)
    expected, got = (logits(load_adapted(f)) for f in (loras["dora"], tmp_path / "lora"))
    close(got, expected, 5e-5)


def test_weights_that_are_stored_transposed(tmp_path):
    model = attach(gpt2(), "mos", r=4)
    randomise(model)
    folder = save(model, tmp_path / "a")
    from toolkit.embedded.tokenizer import build_tokenizer

    base = (gpt2(), build_tokenizer(64))
    convert_adapter(folder, tmp_path / "lora", rank=4, base=base, quiet=True)
    close(logits(PeftModel.from_pretrained(gpt2(), tmp_path / "lora")), logits(model), 5e-5)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("bottleneck", {"size": 3}, "adapts a LlamaMLP here"),
        ("lst", {"reduction": 4}, "adapts a LlamaModel here"),
        ("prompt_tuning", {"num_virtual_tokens": 2}, "more than a change of weights"),
        ("lora", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "more than a change of weights"),
    ],
)
def test_what_is_no_change_of_weights(base, tmp_path, method, fields, message):
    folder, _ = saved(base, tmp_path / "a", method, **fields)
    with pytest.raises(UnsupportedError, match=message):
        convert_adapter(folder, tmp_path / "lora", quiet=True)
    assert not (tmp_path / "lora").exists()


def test_fold_is_exact_and_takes_tasks(base, tmp_path):
    folder, expected = saved(base, tmp_path / "a", "mos", r=4)
    fold_adapter(folder, tmp_path / "lora")
    close(logits(load_adapted(tmp_path / "lora")), expected)
    poly = get_peft_model(tiny.llama(), PolyConfig(task_type="CAUSAL_LM", r=2, n_tasks=3, target_modules=["q_proj"]))
    randomise(poly)
    poly.peft_config["default"].base_model_name_or_path = str(base)
    save(poly, tmp_path / "poly")
    fold_adapter(tmp_path / "poly", tmp_path / "second", task="1")
    from tests.adapters.laws import IDS

    with torch.no_grad():
        wanted = poly.eval()(IDS, task_ids=torch.tensor([1, 1])).logits
    close(logits(load_adapted(tmp_path / "second")), wanted)
    with pytest.raises(SpecError, match="name one, or 'unknown'"):
        fold_adapter(tmp_path / "poly", tmp_path / "third")
    other, _ = saved(base, tmp_path / "b", "hydra_lora")
    with pytest.raises(SpecError, match="a task is for POLY"):
        fold_adapter(other, tmp_path / "third", task="1")


def test_mistakes(base, tmp_path):
    folder, _ = saved(base, tmp_path / "a", "hydra_lora")
    for options in ({"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}):
        with pytest.raises(SpecError):
            convert_adapter(folder, tmp_path / "lora", quiet=True, **options)
    with pytest.raises(MissingError, match=r"no adapter_config\.json"):
        load_adapted(base)
    narrow = tiny.save_model(tiny.llama(hidden_size=32, head_dim=8), tmp_path / "narrow")
    with pytest.raises(CheckpointError, match="does not load on"):
        load_adapted(folder, narrow)
    model = get_peft_model(tiny.llama(), config_of("lora", target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = None
    with pytest.raises(MissingError, match="give it with --base"):
        load_adapted(save(model, tmp_path / "nameless"))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "file").touch()
    with pytest.raises(OutputError):
        fold_adapter(folder, tmp_path / "lora")


def test_commands(base, tmp_path, capsys):
    folder, expected = saved(base, tmp_path / "a", "hydra_lora")
    assert main(["adapters", "fold", folder, str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["from"] == "HYDRA_LORA"
    assert main(["adapters", "convert", folder, str(tmp_path / "c"), "--rank", "48", "--quiet"]) == 0
    assert "relative error" in capsys.readouterr().out
    for name in ("b", "c"):
        close(logits(load_adapted(tmp_path / name)), expected, 5e-5)
    bottleneck, _ = saved(base, tmp_path / "d", "bottleneck", size=3)
    assert main(["adapters", "fold", bottleneck, str(tmp_path / "e")]) == 1
    assert capsys.readouterr().err.startswith("error: bottleneck adapters cannot be written as LoRA")
