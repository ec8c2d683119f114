"""Aligning a folder to another, and the barrier between them before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from tests import tiny
from tests.merge.test_align import permuted
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.cli import main
from toolkit.data.rows import write_rows
from toolkit.errors import DataError, OutputError, SpecError, UnsupportedError
from toolkit.jobs.align import align
from toolkit.models.load import load_tokenizer


@pytest.fixture(scope="module")
def copies(base, tmp_path_factory) -> dict[str, Path]:
    """A model, a copy of it with everything permuted, an unrelated model, and texts that the model itself wrote."""
    folder = tmp_path_factory.mktemp("copies")
    model = tiny.llama()
    view = permuted(model, seed=6)
    copy = tiny.llama(1)
    copy.load_state_dict({name: view.tensor(name) for name in copy.state_dict()})
    tokenizer, rows = load_tokenizer(base), []
    for i in range(8):
        prompt = f"text {i * 37}"
        ids = tiny.greedy(model, tokenizer.encode(prompt), 12)
        rows.append({"text": prompt + tokenizer.decode(ids, skip_special_tokens=True)})
    write_rows(folder / "rows.jsonl", rows)
    return {
        "model": base,
        "permuted": tiny.save_model(copy, folder / "permuted", max_shard_size="100KB"),
        "other": tiny.save_model(tiny.llama(2), folder / "other"),
        "rows": folder / "rows.jsonl",
    }


@pytest.mark.system("weight_matching")
def test_permuted_copy_comes_back_and_its_barrier_is_gone(copies, tmp_path):
    result = align(
        copies["model"],
        copies["permuted"],
        tmp_path / "out",
        data=copies["rows"],
        points=5,
        by_layer=True,
        singular_vectors=True,
        device="cpu",
        quiet=True,
    )
    with open_checkpoint(copies["model"]) as wanted, open_checkpoint(tmp_path / "out") as got:
        assert set(wanted.tensors) == set(got.tensors)
        for name in wanted.tensors:
            assert torch.equal(got.tensor(name), wanted.tensor(name))
    barrier = result.numbers["barrier"]
    assert barrier["alphas"] == [0, 0.25, 0.5, 0.75, 1]
    before, after = barrier["before"], barrier["after"]
    assert before["loss"][0] == after["loss"][0] == pytest.approx(before["loss"][-1], abs=1e-5)
    assert after["loss"] == pytest.approx([after["loss"][0]] * 5, abs=1e-5), "every mix is the model itself"
    assert after["highest"] < 1e-5
    assert before["highest"] > 0.5
    assert before["barrier"][0] == before["barrier"][-1] == 0
    chord = (before["loss"][0] + before["loss"][-1]) / 2
    assert before["barrier"][2] == pytest.approx(before["loss"][2] - chord)
    assert list(barrier["layers"]["before"]) == [f"model.layers.{i}" for i in range(3)]
    assert max(map(abs, barrier["layers"]["after"].values())) < 1e-5 < max(barrier["layers"]["before"].values())
    assert result.numbers["singular_alignment"]["after"] == pytest.approx(1, rel=1e-6)
    assert result.numbers["singular_alignment"]["before"] < 0.5
    assert result.numbers["distance"]["after"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "weight-matching" in card
    assert "| alpha | loss before |" in card


def test_losses_along_the_line_are_those_of_merged_models(copies, tmp_path):
    """Against a linear merge, loaded and measured by transformers."""
    result = align(
        copies["model"], copies["other"], tmp_path / "out", data=copies["rows"], limit=3, points=4, device="cpu"
    )
    tokenizer = load_tokenizer(copies["model"])
    texts = [json.loads(line)["text"] for line in copies["rows"].read_text().splitlines()][:3]
    for when, end in (("before", copies["other"]), ("after", tmp_path / "out")):
        merged = tmp_path / when
        models = [{"model": str(m), "parameters": {"weight": w}} for m, w in ((copies["model"], 1 / 3), (end, 2 / 3))]
        toolkit.merge({"merge_method": "linear", "models": models}, merged, quiet=True)
        model = AutoModelForCausalLM.from_pretrained(merged).eval()
        total, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
            with torch.inference_mode():
                logs = model(ids).logits.log_softmax(-1)[0, :-1]
            total -= float(logs.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
        assert result.numbers["barrier"][when]["loss"][2] == pytest.approx(total / count, rel=1e-4)
    # The aligned model computes what the model did.
    losses = result.numbers["barrier"]
    assert losses["before"]["loss"][-1] == pytest.approx(losses["after"]["loss"][-1], rel=1e-5)
    assert result.numbers["distance"]["after"] < result.numbers["distance"]["before"]


def test_aligned_folder_has_the_files_of_the_model(copies, tmp_path):
    result = toolkit.align(tiny.llama(), copies["permuted"], tmp_path / "out", quiet=True, shard_bytes=50_000)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"} <= names
    assert result.path == tmp_path / "out"
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (copies["permuted"] / "config.json").read_text()
    )
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected, got = (
            AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (copies["permuted"], tmp_path / "out")
        )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_wrong_requests_write_nothing(copies, tmp_path):
    with pytest.raises(SpecError) as caught:
        align(tiny.llama(), copies["other"], tmp_path / "out", points=2, sweeps=0, data=copies["rows"])
    assert [problem.where for problem in caught.value.problems] == ["sweeps", "points", "data"]
    with pytest.raises(SpecError, match="by_layer: needs data"):
        align(copies["model"], copies["other"], tmp_path / "out", by_layer=True)
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match=r"bad.jsonl:1"):
        align(copies["model"], copies["other"], tmp_path / "out", data=tmp_path / "bad.jsonl", device="cpu", quiet=True)
    (tmp_path / "bad.jsonl").unlink()
    words = tmp_path / "words"
    tiny.save_model(tiny.llama(), words)
    tokenizer = AutoTokenizer.from_pretrained(words)
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(words)
    with pytest.raises(UnsupportedError, match="their tokenizers differ, as in '<x>'"):
        align(copies["model"], words, tmp_path / "out", quiet=True)
    small = tiny.llama(intermediate_size=32)
    with pytest.raises(UnsupportedError, match=r"down_proj.weight is \[48, 32\], not \[48, 96\]"):
        align(copies["model"], small, tmp_path / "out", quiet=True)
    with pytest.raises(OutputError, match="exists already"):
        align(copies["model"], copies["other"], words)
    assert {path.name for path in tmp_path.iterdir()} == {"words"}


def test_command(copies, tmp_path, capsys):
    words = ["align", copies["model"], copies["permuted"], tmp_path / "out", "--data", copies["rows"], "--points", 3]
    assert main([str(w) for w in [*words, "--device", "cpu", "--quiet", "--json"]]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["barrier"]["after"]["highest"] < 1e-5
    assert numbers["moved"]["residual"] > 0.5
    words = ["align", copies["model"], copies["permuted"], tmp_path / "half", "--no-residual", "--quiet"]
    assert main([str(w) for w in words]) == 0
    shown = capsys.readouterr().out
    assert "relative distance" in shown
    assert "residual features" not in shown
    assert main([str(w) for w in words]) == 1
    assert "exists already" in capsys.readouterr().err
