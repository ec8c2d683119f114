"""Loading: what is there, what is not a model, and code that must not run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from tests import tiny
from toolkit.embedded.tokenizer import build_tokenizer
from toolkit.errors import CheckpointError, MissingError, SpecError, UnsupportedError
from toolkit.models.hidden import mean_hidden_states
from toolkit.models.load import init_model, load_model, load_tokenizer, pick_device
from toolkit.routing.embedding import EmbeddingSpec, open_embedder
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


@pytest.fixture
def altered(base, tmp_path):
    """Make a copy of the base with other settings in its config, or other tensors."""

    def make(config=(), tensors=lambda state: None):
        folder = tmp_path / "altered"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        settings = json.loads((folder / "config.json").read_text()) | dict(config)
        (folder / "config.json").write_text(json.dumps(settings))
        state = load_file(folder / "model.safetensors")
        tensors(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, lambda s: s.pop(f"{UP}.weight"), rf"lacks weights of the model that config\.json .* \({UP}\.weight\)"),
        ({}, lambda s: s.pop("lm_head.weight"), r"lacks weights .* \(lm_head\.weight\)"),
        ({"num_hidden_layers": 5}, lambda s: None, r"lacks weights .*model\.layers\.3.*, and 15 more"),
        ({"num_hidden_layers": 1}, lambda s: None, r"holds weights that the model of config\.json does not have"),
        ({}, lambda s: s.update({f"{UP}.bias": torch.zeros(96)}), rf"does not have \({UP}\.bias\)"),
        ({"hidden_size": 64}, lambda s: None, r"of other shapes than config\.json says .*\[262, 48\], not \[262, 64\]"),
        (
            {},
            lambda s: s.update({f"{UP}.weight": torch.zeros(96, 48, dtype=torch.int8)}),
            rf"{UP}\.weight is stored as I8, but the model computes with floats",
        ),
        ({"hidden_size": "wide"}, lambda s: None, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, lambda s: None, "ZeroDivisionError"),
        ({"hidden_act": "nonsense"}, lambda s: None, "KeyError: 'nonsense'"),
        ({"vocab_size": -3}, lambda s: None, "transformers cannot load it"),
        ({"quantization_config": 7}, lambda s: None, "transformers cannot load it"),
    ],
)
def test_weights_that_are_not_those_of_the_config(config, tensors, message, altered):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(altered(config, tensors))
    assert "\n" not in str(caught.value)


def test_tied_heads_need_not_be_stored_and_old_buffers_may(altered):
    def tie(state):
        del state["lm_head.weight"]
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)

    model = load_model(altered({"tie_word_embeddings": True}, tie)).model
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return tiny.save_model(BertForMaskedLM(BertConfig(vocab_size=262, **sizes)), tmp_path / "encoder")


def test_pickles_are_never_opened(base, encoder, tmp_path):
    for folder in (encoder, shutil.copytree(base, tmp_path / "base")):
        marker = tmp_path / "it-ran"
        torch.save({"weight": Evil(marker)}, folder / "pytorch_model.bin")
        # Some other safetensors file is no reason to open the pickle beside it.
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        for load in (load_model, lambda f: open_embedder(EmbeddingSpec(model=str(f)))):
            with pytest.raises(CheckpointError, match="transformers cannot load it"):
                load(folder)
        (folder / "other.safetensors").unlink()
        for load in (load_model, lambda f: open_embedder(EmbeddingSpec(model=str(f)))):
            with pytest.raises(CheckpointError, match="only pickled weights"):
                load(folder)
        assert not marker.exists()


def test_encoders_need_a_body_and_no_head(encoder):
    embed = open_embedder(EmbeddingSpec(model=str(encoder)))  # stored with a head, without a pooler
    assert embed(["text"]).shape == (1, 16)
    state = load_file(encoder / "model.safetensors")
    del state["bert.encoder.layer.1.output.dense.weight"]
    save_file(state, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights .*encoder\.layer\.1\.output\.dense\.weight"):
        open_embedder(EmbeddingSpec(model=str(encoder)))
    (encoder / "config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="transformers cannot load it"):
        open_embedder(EmbeddingSpec(model=str(encoder)))


def test_layers_that_the_model_does_not_have(base):
    for layer in (99, 4, -5):
        embed = open_embedder(EmbeddingSpec(model=str(base), layer=layer))
        with pytest.raises(SpecError, match=rf"embedding\.layer: the model has the layers 0 .* to 3, .*got {layer}"):
            embed(["text"])
    assert open_embedder(EmbeddingSpec(model=str(base), layer=-4))(["text"]).shape == (1, 48)


def test_who_opens_an_embedding_decides_whether_its_code_runs(strange, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder, marker = strange
    spec = EmbeddingSpec(model=str(folder), trust_remote_code=True)
    with pytest.raises(UnsupportedError, match="runs code of its own"):
        open_embedder(spec, trust_remote_code=False)
    assert not marker.exists()
    open_embedder(spec)
    assert marker.exists()


def test_random_weights_run_no_code_unasked(strange, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    folder, marker = strange
    with pytest.raises(UnsupportedError, match="allow it with --trust-remote-code"):
        init_model(folder, seed=0)
    assert not marker.exists()
    assert type(init_model(folder, seed=0, trust_remote_code=True).model).__name__ == "StrangeModel"


def test_hidden_states_have_no_dropout_and_modes_come_back():
    model, tokenizer = tiny.llama(attention_dropout=0.5), build_tokenizer()
    expected = mean_hidden_states(model, tokenizer, ["some text"])
    model.train()
    model.model.layers[0].eval()  # as who freezes a part of a model leaves it
    before = [module.training for module in model.modules()]
    assert torch.equal(mean_hidden_states(model, tokenizer, ["some text"]), expected)
    assert [module.training for module in model.modules()] == before
