"""Resizing and pruning LoRAs against dense singular value decompositions, and stock PEFT on what is written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.adapters.laws import close, logits
from toolkit.adapters.ranks import prune, resize
from toolkit.checkpoints.adapters import open_adapter
from toolkit.cli import main
from toolkit.errors import CheckpointError, MissingError, OutputError, SpecError, UnsupportedError
from toolkit.models.load import quiet_transformers


def loaded(base: Path, adapter: Path) -> PeftModel:
    with quiet_transformers():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()


def deltas(folder: Path) -> dict[str, np.ndarray]:
    adapter = open_adapter(folder)
    pairs = {module: adapter.low_rank(module) for module in adapter.parts}
    adapter.close()
    return {name: p.scale * p.rows.astype(np.float64) @ p.cols.astype(np.float64) for name, p in pairs.items()}


@pytest.mark.parametrize("kind", ["plain", "few", "rslora", "patterns"])
def test_other_ranks_are_the_best_of_their_rank(base, loras, kind, tmp_path):
    result = resize(loras[kind], tmp_path / "out", rank=2)
    before, after = deltas(loras[kind]), deltas(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, delta in before.items():
        u, s, vt = np.linalg.svd(delta)
        np.testing.assert_allclose(after[name], (u[:, :2] * s[:2]) @ vt[:2], atol=2e-5 * s[0])
        error = np.linalg.norm(s[2:]) / np.linalg.norm(s)
        assert result.numbers["relative_error"][name] == pytest.approx(error, abs=1e-6)
    assert logits(loaded(base, tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize("kind", ["plain", "wide", "few", "rslora", "patterns"])
def test_larger_ranks_are_exact_for_peft(base, loras, kind, tmp_path):
    resize(loras[kind], tmp_path / "out", rank=9)
    model = loaded(base, tmp_path / "out")
    close(logits(model), logits(loaded(base, loras[kind])), 1e-4 if kind == "patterns" else 1e-5)  # its scale is 16
    assert {
        v.shape[0] for n, v in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "lora_A" in n
    } == {9}


def test_energy_keeps_the_share_that_was_asked_for(loras, tmp_path):
    result = resize(loras["plain"], tmp_path / "out", energy=0.8)
    ranks = {
        module: len(np.linalg.svd(d)[1][np.linalg.svd(d)[1] > 1e-4]) for module, d in deltas(tmp_path / "out").items()
    }
    for name, delta in deltas(loras["plain"]).items():
        shares = np.cumsum(np.square(np.linalg.svd(delta)[1])) / np.square(delta).sum()
        assert ranks[name] == int(np.argmax(shares >= 0.8)) + 1
    assert result.numbers["ranks"] == sum(ranks.values())


def test_what_is_stored_whole_stays(base, tmp_path):
    folder = tiny.save_lora(base, tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["lm_head"])
    resize(folder, tmp_path / "out", rank=8)
    close(logits(loaded(base, tmp_path / "out")), logits(loaded(base, folder)), 1e-5)
    kept = [load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "out")]
    (name,) = [n for n in kept[0] if "lm_head" in n]
    assert torch.equal(kept[0][name], kept[1][name])


def test_embeddings(base, tmp_path):
    folder = tiny.save_lora(base, tmp_path / "lora", r=3, target_modules=["embed_tokens", "v_proj"])
    resize(folder, tmp_path / "out", rank=5)
    close(logits(loaded(base, tmp_path / "out")), logits(loaded(base, folder)), 1e-5)


def test_pruning_is_the_best_choice_of_ranks_over_all_modules(base, loras, tmp_path):
    """No other ranks with as many in all leave a smaller error: tried, all of them, on six pairs of rank 2."""
    result = prune(loras["few"], tmp_path / "out", share=0.5)
    before, after = deltas(loras["few"]), deltas(tmp_path / "out")
    values = {name: np.linalg.svd(delta)[1][:2] for name, delta in before.items()}
    got = sum(np.square(delta - after.get(name, 0)).sum() for name, delta in before.items())
    best = min(
        sum(np.square(values[name][rank:]).sum() for name, rank in zip(values, ranks, strict=True))
        for ranks in itertools.product(range(3), repeat=len(values))
        if sum(ranks) == 2 * len(values) - len(values)
    )
    assert got == pytest.approx(best, rel=1e-5)
    assert result.numbers["ranks_before"] == 2 * len(values)
    assert result.numbers["ranks"] == len(values)
    assert logits(loaded(base, tmp_path / "out")).isfinite().all()


def test_modules_that_lose_all_ranks_are_gone(base, tmp_path):
    folder = tiny.save_lora(base, tmp_path / "lora", r=2, target_modules=["q_proj", "down_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {n: v * (1e-3 if "layers.1" in n else 1) for n, v in tensors.items()}, folder / "adapter_model.safetensors"
    )
    prune(folder, tmp_path / "out", share=0.34)
    assert not any("layers.1" in name for name in deltas(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 4
    close(logits(loaded(base, tmp_path / "out")), logits(loaded(base, folder)), 1e-4)


def test_mistakes(loras, tmp_path):
    for options in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}):
        with pytest.raises(SpecError):
            resize(loras["plain"], tmp_path / "out", **options)
    with pytest.raises(SpecError, match="between 0 and 1"):
        prune(loras["plain"], tmp_path / "out", share=1.0)
    with pytest.raises(UnsupportedError, match="convert it to LoRA first"):
        resize(loras["dora"], tmp_path / "out", rank=2)
    with pytest.raises((MissingError, CheckpointError)):
        resize(tmp_path / "nothing", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
    resize(loras["plain"], tmp_path / "out", rank=2)
    with pytest.raises(OutputError, match="exists already"):
        resize(loras["plain"], tmp_path / "out", rank=2)


def test_commands(loras, tmp_path, capsys):
    assert main(["adapters", "resize", str(loras["plain"]), str(tmp_path / "a"), "--rank", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 2 * 21
    assert main(["adapters", "prune", str(loras["plain"]), str(tmp_path / "b"), "--share", "0.25"]) == 0
    assert "84 -> 63" in capsys.readouterr().out
    assert main(["adapters", "resize", str(loras["plain"]), str(tmp_path / "c")]) == 2
    assert capsys.readouterr().err.startswith("error: give one of rank and energy")
