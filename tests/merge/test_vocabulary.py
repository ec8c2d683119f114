"""Merging models whose vocabularies differ: token by token, as mergekit does it and as the spec says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.merge.laws import run_mergekit
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.embedded.tokenizer import VOCAB_SIZE, build_tokenizer
from toolkit.errors import SpecError
from toolkit.merge.plan import make_plan
from toolkit.merge.run import merge

ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def save(folder: Path, seed: int, tokens: list[str], unused: int = 0) -> Path:
    """Write a tiny model that knows further tokens, and has rows that no token uses."""
    model = tiny.llama(seed, num_hidden_layers=2, vocab_size=VOCAB_SIZE + len(tokens) + unused)
    tiny.save_model(model, folder)
    tokenizer = build_tokenizer(tiny.CONTEXT)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "base": save(root / "base", 0, []),
        "a": save(root / "a", 1, ["<x>", "<y>"]),
        "b": save(root / "b", 2, ["<y>", "<z>"], unused=3),
    }


def rows(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return the row of every token, by tensor."""
    tokens = AutoTokenizer.from_pretrained(folder).get_vocab()
    with open_checkpoint(folder) as checkpoint:
        tables = {name: checkpoint.tensor(name).float().numpy() for name in ROWS if name in checkpoint.tensors}
    return {name: {token: table[row] for token, row in tokens.items()} for name, table in tables.items()}


def spec_of(folders: dict[str, Path], method: str = "linear", **changes: Any) -> dict[str, Any]:
    inputs = [{"model": str(folders[m]), "parameters": {"weight": w}} for m, w in (("a", 0.75), ("b", 0.25))]
    spec = {"merge_method": method, "models": inputs, "dtype": "float32", "tokenizer": {"source": "union"}}
    return spec | ({"base_model": str(folders["base"])} if method != "linear" else {}) | changes


@pytest.mark.parametrize(
    ("method", "tokenizer"),
    [
        ("linear", {"source": "union"}),
        ("task_arithmetic", {"source": "union"}),
        ("task_arithmetic", {"source": "base"}),
        ("task_arithmetic", {"source": "b"}),
        ("linear", {"source": "union", "pad_to_multiple_of": 32}),
        ("linear", {"source": "union", "tokens": {"<y>": {"source": "a", "force": True}}}),
        ("linear", {"tokens": {"<new>": {"source": {"kind": "model_token", "model": "b", "token": "<z>"}}}}),
        ("linear", {"tokens": {"<new>": {"source": {"kind": "model_token", "model": "a", "token_id": 7}}}}),
        ("linear", {"tokens": {"<x>": {"source": {"kind": "zero"}}}}),
    ],
)
def test_every_token_has_the_row_that_mergekit_gives_it(method, tokenizer, models, tmp_path):
    text = json.dumps(tokenizer)
    for name in "ab":
        text = text.replace(f'"source": "{name}"', f'"source": "{models[name]}"')
        text = text.replace(f'"model": "{name}"', f'"model": "{models[name]}"')
    spec = spec_of(models, method, tokenizer=json.loads(text))
    ours, theirs = rows(merge(spec, tmp_path / "ours", quiet=True).path), rows(run_mergekit(spec, tmp_path / "theirs"))
    for name in ROWS:
        assert ours[name].keys() == theirs[name].keys()
        for token, row in ours[name].items():
            np.testing.assert_allclose(row, theirs[name][token], rtol=1e-5, atol=1e-6, err_msg=f"{name} {token}")


def test_union_by_hand(models, tmp_path):
    """Without a base: a token of one model is that model's row, one of both is merged."""
    result = merge(spec_of(models), tmp_path / "out", quiet=True)
    got, a, b = (rows(folder)["lm_head.weight"] for folder in (result.path, models["a"], models["b"]))
    assert set(got) == set(a) | set(b)
    np.testing.assert_array_equal(got["<x>"], a["<x>"])
    np.testing.assert_array_equal(got["<z>"], b["<z>"])
    for token in ("<y>", "A"):
        np.testing.assert_allclose(got[token], 0.75 * a[token] + 0.25 * b[token], rtol=1e-6)
    config = json.loads((result.path / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(result.path)
    assert config["vocab_size"] == len(tokenizer) == VOCAB_SIZE + 3
    assert tokenizer.encode("a<x><z>b") == [97, tokenizer.get_vocab()["<x>"], tokenizer.get_vocab()["<z>"], 98]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(result.path)(torch.tensor([[97, 264]])).logits
    assert logits.shape[-1] == VOCAB_SIZE + 3


def test_added_tokens_are_told(models, tmp_path):
    spec = spec_of(models, tokenizer={"tokens": {"<new>": {"source": {"kind": "zero"}}}})
    out = merge(spec, tmp_path / "out", quiet=True).path
    assert json.loads((out / "merge.json").read_text())["added_tokens"] == ["<z>", "<new>"]
    assert "Added tokens: `<z>`, `<new>`." in (out / "README.md").read_text()
    assert make_plan(spec_of(models, tokenizer={"source": str(models["b"])})).added_tokens == []


def test_rows_that_no_token_uses_are_kept(models, tmp_path):
    result = merge(spec_of(models, tokenizer={"source": str(models["b"])}), tmp_path / "out", quiet=True)
    with open_checkpoint(result.path) as got, open_checkpoint(models["b"]) as b:
        assert got.info("lm_head.weight").shape == b.info("lm_head.weight").shape
        np.testing.assert_array_equal(got.tensor("lm_head.weight")[-3:], b.tensor("lm_head.weight")[-3:])


def test_rows_that_fill_up_are_the_mean(models, tmp_path):
    spec = spec_of(models, tokenizer={"source": "union", "pad_to_multiple_of": 32})
    with open_checkpoint(merge(spec, tmp_path / "out", quiet=True).path) as got:
        head = got.tensor("lm_head.weight")
    means = [open_checkpoint(models[m]).tensor("lm_head.weight").double().mean(0) for m in "ab"]
    assert len(head) == 288
    for row in head[VOCAB_SIZE + 3 :]:
        np.testing.assert_allclose(row, 0.75 * means[0] + 0.25 * means[1], rtol=1e-5, atol=1e-7)


def test_other_tensors_are_merged_as_without_it(models, tmp_path):
    with_union = merge(spec_of(models, "task_arithmetic"), tmp_path / "union", quiet=True).path
    parts = {name: open_checkpoint(folder) for name, folder in models.items()}
    with open_checkpoint(with_union) as got:
        for name in got.tensors:
            if name in ROWS:
                continue
            base, a, b = (parts[m].tensor(name).double() for m in ("base", "a", "b"))
            np.testing.assert_allclose(got.tensor(name), base + 0.75 * (a - base) + 0.25 * (b - base), atol=1e-6)


def test_loras_keep_their_exact_deltas(models, tmp_path):
    lora = tiny.save_lora(models["base"], tmp_path / "lora")
    inputs = [{"model": str(lora), "parameters": {"weight": 0.5}}, {"model": str(models["a"])}]
    spec = spec_of(models, "task_arithmetic", models=inputs)
    got = merge(spec, tmp_path / "out", quiet=True).path
    merged = tiny.load_merged(models["base"], lora).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    base, a = (open_checkpoint(models[m]).tensor(name) for m in ("base", "a"))
    with open_checkpoint(got) as checkpoint:
        expected = base + 0.5 * (merged[name] - base) + (a - base)
        np.testing.assert_allclose(checkpoint.tensor(name), expected, rtol=1e-4, atol=1e-5)
    assert "<x>" in rows(got)["lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, "models[1].model: lm_head.weight and 1 more tensors: shape [267, 48]"),
        ({"tokenizer": {"source": "elsewhere"}}, "tokenizer.source: elsewhere is no model of this merge (they are"),
        ({"tokenizer": {"sorce": "union"}}, "tokenizer.sorce: unknown key 'sorce'; did you mean 'source'?"),
        ({"tokenizer_source": "union"}, "give either tokenizer or tokenizer_source"),
        (
            {"tokenizer": {"tokens": {"<n>": {"source": {"kind": "model_token", "model": "A", "token": "<no>"}}}}},
            "tokenizer.tokens.<n>.source: A has no token '<no>'",
        ),
        (
            {"tokenizer": {"tokens": {"<n>": {"source": {"kind": "model_token", "model": "A", "token_id": 999}}}}},
            "tokenizer.tokens.<n>.source: A has 264 rows, not 1000",
        ),
        (
            {"tokenizer": {"tokens": {"<n>": {"source": {"kind": "zero", "token": "x"}}}}},
            "a row of zeros is of no model",
        ),
        (
            {"chat_template": "chatlm"},
            "chat_template: 'chatlm' is neither a template nor the name of one; did you mean",
        ),
    ],
)
def test_bad_tokenizers(change, message, models):
    text = json.dumps(spec_of(models) | change).replace('"model": "A"', f'"model": "{models["a"]}"')
    with pytest.raises(SpecError) as caught:
        make_plan(json.loads(text))
    assert message.replace("A has", f"{models['a']} has") in str(caught.value)


def test_model_without_a_tokenizer_is_one_clear_line(models, tmp_path):
    bare = tiny.llama(num_hidden_layers=2)
    bare.save_pretrained(tmp_path / "bare")
    spec = spec_of(models)
    spec["models"][1]["model"] = str(tmp_path / "bare")
    with pytest.raises(SpecError, match=r"tokenizer\.source: .*bare: no tokenizer\.json"):
        make_plan(spec)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n",
    "llama3": "<|bos|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>",
    "mistral": "<|bos|>[INST] Be brief.\n\nHi [/INST] Ho<|end|>",
    "alpaca": "<|bos|>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHo<|end|>\n\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Ho[|endofturn|]\n",
    "{{ messages[0]['content'] }}!": "Be brief.!",
}


@pytest.mark.parametrize("name", RENDERED)
def test_chat_templates(name, models, tmp_path):
    spec = spec_of(models, chat_template=name, tokenizer=None) | {"models": spec_of(models)["models"][:1]}
    tokenizer = AutoTokenizer.from_pretrained(merge(spec, tmp_path / "out", quiet=True).path)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == RENDERED[name]


def test_usual_chat_template_is_taken(models, tmp_path):
    spec = spec_of(models, chat_template="auto")
    for index, name in enumerate(("a", "b")):
        copy = save(tmp_path / name, index, ["<x>"])
        (copy / "chat_template.jinja").write_text("{{ 'usual' }}")
        spec["models"].append({"model": str(copy), "parameters": {"weight": 0.1}})
    spec["models"].append({"model": str(models["base"]), "parameters": {"weight": 0.1}})
    spec["models"] = spec["models"][2:]
    out = merge(spec, tmp_path / "out", quiet=True).path
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(CHAT, tokenize=False) == "usual"
