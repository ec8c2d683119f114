"""Loading: what is there, what is not a model, and code that must not run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from toolkit.errors import CheckpointError, MissingError, UnsupportedError
from toolkit.models.load import init_model, load_model, load_tokenizer, pick_device
from toolkit.serving.engine import Engine

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class StrangeConfig(LlamaConfig):
    model_type = "strange"
class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig
"""


@pytest.fixture
def strange(base, tmp_path):
    """A model that brings its own code, and the file that this code makes when it runs."""
    folder, marker = tmp_path / "strange", tmp_path / "it-ran"
    shutil.copytree(base, folder)
    (folder / "modeling_strange.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_strange.StrangeConfig", "AutoModelForCausalLM": "modeling_strange.StrangeModel"}
    config |= {"model_type": "strange", "architectures": ["StrangeModelForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, marker


def test_code_of_a_model_runs_only_when_it_is_trusted(strange, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder, marker = strange
    for load in (load_model, Engine):
        with pytest.raises(UnsupportedError, match="runs code of its own; allow it with --trust-remote-code"):
            load(str(folder))
    assert not marker.exists()
    loaded = load_model(str(folder), trust_remote_code=True)
    assert marker.exists()
    assert type(loaded.model).__name__ == "StrangeModel"


def test_what_is_no_model(base, loras, tmp_path):
    with pytest.raises(CheckpointError, match="an adapter, not a model"):
        load_model(loras["plain"])
    with pytest.raises(MissingError, match="no such folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(MissingError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(MissingError, match="not a model folder"):
        load_model(base / "config.json")
    shutil.copytree(base, tmp_path / "cut")
    with (tmp_path / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(tmp_path / "cut")
    shutil.copytree(base, tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(UnsupportedError, match="transformers cannot load it"):
        load_model(tmp_path / "odd")


def test_models_load_as_they_are_stored_and_as_asked(base):
    assert load_model(base).model.dtype == torch.float32
    assert load_model(base, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert not load_model(base).model.training


def test_random_weights_follow_from_the_seed(base):
    states = [init_model(base, seed=s).model.state_dict() for s in (1, 1, 2)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UnsupportedError, match="device 'nonsense' cannot be used"):
        pick_device("nonsense")


def test_tokenizer_without_padding_pads_with_its_end(base, tmp_path):
    shutil.copytree(base, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "m")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
