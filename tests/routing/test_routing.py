"""Routers against brute force, through files, and judged by hand-made cases."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertModel

from tests import tiny
from toolkit.data.rows import write_rows
from toolkit.errors import CheckpointError, DataError, MissingError, OutputError, SpecError, UnsupportedError
from toolkit.jobs.route import explain_route
from toolkit.models.hidden import mean_hidden_states
from toolkit.models.load import load_model, load_tokenizer
from toolkit.routing.embedding import EmbeddingSpec, open_embedder
from toolkit.routing.evaluate import judge
from toolkit.routing.features import Features
from toolkit.routing.fit import fit_router
from toolkit.routing.router import Router, load_router
from toolkit.routing.spec import FeaturesSpec


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    texts = {
        "digits": [f"{i * 37} {i * 91} {i}" for i in range(30)],
        "letters": [f"some words about {'abcdefghij'[i % 10] * 5}" for i in range(30)],
    }
    for name, lines in texts.items():
        write_rows(folder / f"{name}.jsonl", [{"prompt": line, "completion": "x"} for line in lines])
    return folder


def spec_of(base, prompts, **changes):
    experts = {name: str(prompts / f"{name}.jsonl") for name in ("digits", "letters")}
    return {"experts": experts, "embedding": {"model": str(base)}} | changes


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_embedding_is_the_mean_of_the_hidden_states(layer, base):
    loaded = load_model(base)
    texts = ["a", "some longer text", "naïve café", ""]
    got = mean_hidden_states(loaded.model, loaded.tokenizer, texts, layer=layer, batch_size=3)
    for text, vector in zip(texts[:3], got, strict=False):
        with torch.inference_mode():
            ids = torch.tensor([loaded.tokenizer.encode(text)])
            states = loaded.model(ids, output_hidden_states=True).hidden_states[layer][0]
        torch.testing.assert_close(vector, states.mean(0), rtol=1e-4, atol=1e-5)
    cut = mean_hidden_states(loaded.model, loaded.tokenizer, ["abcdef"], layer=layer, max_length=3)
    torch.testing.assert_close(cut, mean_hidden_states(loaded.model, loaded.tokenizer, ["abc"], layer=layer))


def test_any_encoder_folder_embeds(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 262,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    encoder = BertModel(BertConfig(**sizes)).eval()
    tiny.save_model(encoder, tmp_path / "encoder")
    embed = open_embedder(EmbeddingSpec(model=str(tmp_path / "encoder")))
    tokenizer = load_tokenizer(tmp_path / "encoder")
    with torch.inference_mode():
        expected = encoder(torch.tensor([tokenizer.encode("hello")])).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(embed(["hello", "a much longer text"])[0], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_fitted_router_is_saved_and_loaded(base, prompts, tmp_path):
    router = fit_router(spec_of(base, prompts), tmp_path / "router", quiet=True)
    texts = ["12 345 6789", "some words about zzzzz"]
    choices = router.choose(texts)
    assert [c.expert for c in choices] == ["digits", "letters"]
    assert choices[0].margin is not None
    assert choices[0].margin > 0
    again = load_router(tmp_path / "router")
    assert again.version == router.version == json.loads((tmp_path / "router" / "router.json").read_text())["version"]
    np.testing.assert_array_equal(again.score(texts), router.score(texts))
    assert sorted(p.name for p in (tmp_path / "router").iterdir()) == ["router.json", "router.safetensors"]


def test_embedding_model_can_be_an_object(base, prompts):
    loaded = load_model(base)
    router = fit_router(spec_of(base, prompts, embedding={"model": (loaded.model, loaded.tokenizer)}), quiet=True)
    same = fit_router(spec_of(base, prompts), quiet=True)
    np.testing.assert_allclose(router.score(["12 3"]), same.score(["12 3"]), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "centriod"}, "router: unknown router 'centriod'; did you mean 'centroid'?"),
        ({"parameters": {"shrinkige": 1}}, "parameters.shrinkige: unknown key 'shrinkige'; did you mean 'shrinkage'?"),
        ({"experts": {}}, "experts: Dictionary should have at least 1 item"),
        ({"embedding": None}, "no features: give embedding (a model), words (no model), form (such as 1), or several"),
        ({"outcomes": {"data": "x"}}, "give either experts (prompts made for each) or outcomes (measured answers)"),
        ({"policy": {"costs": {"x": 1}}}, "policy.costs.x: not an expert (known: digits, letters)"),
        ({"policy": {"top": 3}}, "policy.top: there are 2 experts, got 3"),
        ({"embeding": 1}, "embeding: unknown key 'embeding'; did you mean 'embedding'?"),
    ],
)
def test_bad_specs(change, message, base, prompts):
    with pytest.raises(SpecError) as caught:
        fit_router(spec_of(base, prompts, **change), quiet=True)
    assert message in str(caught.value)


def test_rows_without_a_prompt_and_folders_without_a_router(base, prompts, tmp_path):
    write_rows(tmp_path / "bad.jsonl", [{"label": 3}])
    with pytest.raises(DataError, match=r"bad\.jsonl:1: expected prompt and completion, messages, or text"):
        fit_router(spec_of(base, prompts, experts={"a": str(tmp_path / "bad.jsonl")}), quiet=True)
    with pytest.raises(MissingError, match=r"no router\.json"):
        load_router(base)
    fit_router(spec_of(base, prompts), tmp_path / "router", quiet=True)
    config = json.loads((tmp_path / "router" / "router.json").read_text())
    (tmp_path / "router" / "router.json").write_text(json.dumps({k: v for k, v in config.items() if k != "experts"}))
    with pytest.raises(CheckpointError, match=r"router\.json: experts: expected a list of different names, got None"):
        load_router(tmp_path / "router")


REMOTE_CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel
Path({marker!r}).write_text("")
class RemoteConfig(BertConfig):
    model_type = "remote"
class RemoteModel(BertModel):
    config_class = RemoteConfig
"""


@pytest.fixture
def remote_router(base, prompts, tmp_path, monkeypatch):
    """A saved router that claims trust, with an embedding that would run code; and the file which that code writes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    router = fit_router(spec_of(base, prompts), tmp_path / "router", quiet=True)
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = tiny.save_model(BertModel(BertConfig(vocab_size=262, **sizes)), tmp_path / "encoder")
    classes = {"AutoConfig": "remote.RemoteConfig", "AutoModel": "remote.RemoteModel"}
    remote = json.loads((encoder / "config.json").read_text()) | {"model_type": "remote", "auto_map": classes}
    (encoder / "config.json").write_text(json.dumps(remote))
    (encoder / "remote.py").write_text(REMOTE_CODE.format(marker=str(tmp_path / "ran")))
    config = json.loads((tmp_path / "router" / "router.json").read_text())
    shown = router.to_dict()["features"]["embedding"]
    assert config["features"]["embedding"].keys() == shown.keys() == {"model", "layer", "max_length", "prefix"}
    config["features"]["embedding"] |= {"model": str(encoder), "trust_remote_code": True}
    (tmp_path / "router" / "router.json").write_text(json.dumps(config))
    return tmp_path / "router", tmp_path / "ran"


def test_saved_router_cannot_allow_code_to_run(remote_router):
    folder, ran = remote_router
    with pytest.raises(UnsupportedError, match="allow it with --trust-remote-code"):
        load_router(folder).choose(["hello"])
    with pytest.raises(UnsupportedError, match="allow it with --trust-remote-code"):
        explain_route(folder, "hello")
    assert not ran.exists()
    assert explain_route(folder, "hello", trust_remote_code=True).numbers["expert"] in ("digits", "letters")
    assert ran.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 5}, "experts: expected a list of different names, got 5"),
        ({"experts": ["digits", "digits"]}, "experts: expected a list of different names"),
        ({"experts": ["digits"]}, r"not a centroid router of 1 experts: centroids is \[2, 48\], expected \[1, 48\]"),
        ({"router": "centriod"}, "router: 'centriod' is no router"),
        ({"router": ["centroid"]}, r"router: \['centroid'\] is no router"),
        ({"features": 5}, "features: expected a block, got 5"),
        ({"features": {"embedding": {"model": "m", "layer": "x"}}}, r"features: embedding\.layer: "),
        ({"features": {}}, "features: top level: no features"),
        ({"policy": {"prise": 1}}, "policy: prise: unknown key 'prise'; did you mean 'price'"),
        ({"policy": {"costs": {"nobody": 1}}}, r"policy\.costs\.nobody: not an expert"),
        ({"domains": 5}, "domains: expected a block, got 5"),
        ({"format": 1}, "format 1, and this toolkit reads 2; fit the router anew"),
    ],
)
def test_config_of_a_router_that_does_not_fit(change, message, base, prompts, tmp_path):
    fit_router(spec_of(base, prompts), tmp_path / "router", quiet=True)
    config = json.loads((tmp_path / "router" / "router.json").read_text())
    (tmp_path / "router" / "router.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load_router(tmp_path / "router")


def test_state_of_a_router_that_does_not_fit(base, prompts, tmp_path):
    fit_router(spec_of(base, prompts), tmp_path / "router", quiet=True)
    path = tmp_path / "router" / "router.safetensors"
    state = load_file(path)
    save_file({name: value for name, value in state.items() if name != "router.whitening"}, path)
    with pytest.raises(CheckpointError, match="whitening is missing"):
        load_router(tmp_path / "router")
    save_file(state | {"router.center": np.full(48, np.nan, np.float32)}, path)
    with pytest.raises(CheckpointError, match="center holds values that are not finite"):
        load_router(tmp_path / "router")


def test_embedding_of_another_width(base, prompts):
    router = fit_router(spec_of(base, prompts), quiet=True)
    router.embedder = lambda texts: np.zeros((len(texts), 7), np.float32)
    with pytest.raises(CheckpointError, match="the embedding has 7 numbers, the router was fitted on 48; fit it anew"):
        router.choose(["hello"])


def test_output_is_refused_before_anything_is_embedded(base, prompts, tmp_path):
    (tmp_path / "mine").write_text("x")

    def embed(texts):
        raise AssertionError("nothing is to be embedded")

    with pytest.raises(OutputError, match="exists already"):
        fit_router(spec_of(base, prompts), tmp_path, quiet=True, embedder=embed)


def test_router_with_one_expert_has_no_margin(base, prompts):
    experts = {"digits": str(prompts / "digits.jsonl")}
    router = fit_router(spec_of(base, prompts, experts=experts), quiet=True)
    text = json.dumps(explain_route(router, "12 3").to_dict())
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["margin"] is None


def test_judgement_by_hand():
    experts = ["a", "b", "base"]
    labels = np.array([0, 0, 1, 1])
    chosen = np.array([0, 1, 1, 2])
    quality = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 1, 0]], float)
    numbers = judge(experts, labels, chosen, quality).numbers
    assert numbers["accuracy"] == 50
    assert numbers["confusion"]["a"] == {"a": 1, "b": 1, "base": 0}
    assert numbers["confusion"]["b"] == {"a": 0, "b": 1, "base": 1}
    assert numbers["quality"] == {
        "router": 75.0,
        "own expert": 100.0,
        "always base": 25.0,
        "best single (b)": 75.0,
        "random": 62.5,
        "oracle": 100.0,
    }


def test_first_of_equal_experts_wins():
    state = {
        "center": np.zeros(2, np.float32),
        "whitening": np.eye(2, dtype=np.float32),
        "centroids": np.ones((2, 2), np.float32),
    }
    spec = FeaturesSpec(embedding=EmbeddingSpec(model="m"))
    features = Features(spec, embedder=lambda texts: np.ones((len(texts), 2), np.float32))
    router = Router("centroid", ["x", "y"], state, features)
    assert router.choose(["?"])[0].expert == "x"
    assert router.choose([]) == []
