"""The benchmark of serving, at a size that takes seconds: its answers, its arithmetic, its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from benchmarks.measure import Cost
from benchmarks.serving.__main__ import ratio_table, ratios, table, why_no_vllm
from benchmarks.serving.drive import RUNS, Results, _turns
from benchmarks.serving.hf import make as hf
from benchmarks.serving.ours import make as ours_of
from benchmarks.serving.work import CASES, POSITIONS, SIZES, write_adapter, write_all, write_base
from toolkit.embedded.tokenizer import build_tokenizer

REPOSITORY = Path(__file__).parents[2]


def test_sizes_are_the_anchors():
    """17 and 111 million parameters, by their own sums."""
    for name, millions in (("17M", 17), ("111M", 111)):
        size = SIZES[name]
        linears = sum(inputs * outputs for _, inputs, outputs in size.linears())
        assert round((linears + 2 * size.vocabulary * size.hidden) / 1e6) == millions


def test_folders_are_what_transformers_and_peft_read(tmp_path):
    """Logits of both, with and without the adapter, against the product written out."""
    size = SIZES["tiny"]
    base, folder = write_base(tmp_path / "base", size), write_adapter(tmp_path / "a0", size, 0)
    model = AutoModelForCausalLM.from_pretrained(base)
    wanted = sorted(f"{name}.weight" for name, _, _ in size.linears())
    assert sorted(n for n, _ in model.named_parameters() if "proj" in n) == wanted
    adapted = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    tensors, before = load_file(folder / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    for name in wanted:
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = before[name] + tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
        np.testing.assert_allclose(adapted.get_parameter(name).detach(), expected, atol=1e-5)


def test_answers_are_decisive_and_the_adapters_change_them(tmp_path):
    """Else equal rows would say little."""
    size, case = SIZES["tiny"], CASES["16 adapters"]
    folder = write_all(tmp_path, size, 2, 3)
    assert json.loads((folder / "adapters" / "a2" / "adapter_config.json").read_text())["r"] == 1
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.tensor(case.prompts(size))
    with torch.inference_mode():
        plain = model(ids).logits
        adapted = PeftModel.from_pretrained(model, str(folder / "adapters" / "a0"))(ids).logits
    top = plain.topk(2).values
    assert (top[..., 0] - top[..., 1]).median() > 0.1
    assert (plain.argmax(-1) != adapted.argmax(-1)).float().mean() > 0.3


def test_ours_and_peers_answer_the_same(tmp_path):
    """Every case of the small engine, at the smallest size: our rows against those of generate and of PEFT."""
    size = SIZES["tiny"]
    folder = write_all(tmp_path, size, 16, 16)
    build_tokenizer(POSITIONS).save_pretrained(folder / "base")
    ours, plain, mixed = ours_of("toolkit", folder), hf("transformers", folder), hf("PEFT", folder)
    for name in ("base", "one adapter", "16 adapters", "prefill, 16 adapters"):
        case = CASES[name]
        peer = mixed if case.adapters else plain
        peer.prepare(case)
        assert list(ours.run(case, size)) == list(peer.run(case, size)), name
    shares = ours.shares(CASES["16 adapters"], size)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 < share < 1 for share in shares.values())
    assert shares["model"] > 0.5 > shares["scheduler"]
    assert "schedule" not in vars(ours.small.scheduler), "the clock is taken off again"
    ours.close()


def test_ratios_are_of_medians():
    results = Results()
    for case, engine, seconds in (("base", "toolkit", [1.0, 9.0, 2.0]), ("16 adapters", "toolkit", [4.0])):
        results.costs[case, engine] = [Cost(cpu, 0, 0) for cpu in seconds]
    results.costs["16 adapters", "PEFT"] = [Cost(8.0, 0, 0)]
    assert results.speed("base", "toolkit") == 16 * 32 / 2.0
    assert results.speed("base", "PEFT") is None
    found = {tuple(one["of"]): (one["ratio"], one["aim"]) for one in ratios(results, "17M")}
    assert found == {("base", "toolkit"): (0.5, 0.8), ("16 adapters", "PEFT"): (2.0, 1.8)}
    results.answers = {("16 adapters", "toolkit"): [[1, 2], [3, 4]], ("16 adapters", "PEFT"): [[1, 2], [3, 5]]}
    lines = list(table(results, ["toolkit", "PEFT"], ["base", "16 adapters"]))
    assert lines[2:] == ["| base | 256 |  |  |", "| 16 adapters | 128 | 64 | PEFT 1/2 |"]
    assert "| 16 adapters | our own base | 0.50 | 0.8 |" in list(ratio_table(results, "17M"))


def test_short_cases_come_three_times_in_turn():
    assert _turns(["base", "64 adapters", "16 adapters"]) == [*["base", "16 adapters"] * 3, "64 adapters"]


def test_prefill_counts_the_prompts():
    assert CASES["prefill, 16 adapters"].tokens == 4 * 512
    assert CASES["64 adapters"].tokens == 64 * 32
    assert len(set(CASES["200 of 1,000"].models)) == 200


def test_every_engine_is_asked_what_there_is():
    assert all(case in CASES for cases in RUNS.values() for case in cases)


def test_reasons_without_vllm(tmp_path):
    assert "no --vllm" in str(why_no_vllm(None))
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\necho 'No module named vllm' >&2\nexit 1\n")
    empty.chmod(0o755)
    assert "No module named vllm" in str(why_no_vllm(str(empty)))


@pytest.mark.slow
def test_all_of_it_at_the_smallest_size(tmp_path):
    """Every engine here answers each row with the same tokens."""
    command = [sys.executable, "-m", "benchmarks.serving", "--size", "tiny", "--repeat", "1", "--work", str(tmp_path)]
    asked = "base;one adapter;16 adapters;prefill, base;prefill, 16 adapters"
    command += ["--cases", asked, "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "vLLM is skipped: no --vllm" in done.stdout
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["rows_equal"] == {
        f"{case}/{engine}": [16, 16]
        for case in asked.split(";")
        for engine in ("transformers", "continuous", "PEFT")
        if case in RUNS[engine]
    }
    assert sum(saved["shares_of_our_step"].values()) == pytest.approx(1)
    assert 0 < saved["shares_of_our_step"]["scheduler"] < 0.3
    assert {"torch", "transformers", "peft", "composition-toolkit"} <= set(saved["versions"])
