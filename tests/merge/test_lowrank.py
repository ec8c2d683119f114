"""Several LoRAs into one: exact where the merged delta is a sum, the best of its rank elsewhere."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from toolkit.checkpoints.adapters import LowRank, open_adapter
from toolkit.errors import CheckpointError, SpecError
from toolkit.merge.lowrank import factor, recompress
from toolkit.merge.run import merge


def deltas(base, folder):
    """What PEFT makes of an adapter, as changes of the base's weights."""
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    return {k: v.double() - start[k].double() for k, v in tiny.load_merged(base, folder).state_dict().items()}


def spec_of(base, loras, method, names, **changes):
    weights = dict(zip(names, (0.6, -0.4, 0.3), strict=False))
    models = [{"model": str(loras[n]), "parameters": {"weight": w}} for n, w in weights.items()]
    return {"merge_method": method, "base_model": str(base), "models": models, "output": {"type": "adapter"}} | changes


@pytest.mark.parametrize("names", [("plain", "wide"), ("rslora", "few", "patterns")])
def test_sum_of_deltas_is_exact(names, base, loras, tmp_path):
    spec = spec_of(base, loras, "task_arithmetic", names, parameters={"lambda": 0.8})
    result = merge(spec, tmp_path / "out", quiet=True)
    got = deltas(base, tmp_path / "out")
    parts = [deltas(base, loras[n]) for n in names]
    for name in got:
        expected = 0.8 * sum(w * p[name] for w, p in zip((0.6, -0.4, 0.3), parts, strict=False))
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5)
    assert max(result.numbers["relative_error"].values()) == 0
    module = "model.layers.0.self_attn.q_proj"
    assert open_adapter(tmp_path / "out").rank(module) == sum(open_adapter(loras[n]).rank(module) for n in names)


def test_average_is_exact(base, loras, tmp_path):
    spec = spec_of(base, loras, "linear", ("plain", "few"))
    merge(spec, tmp_path / "out", quiet=True)
    got, plain, few = (deltas(base, f) for f in (tmp_path / "out", loras["plain"], loras["few"]))
    for name in got:
        expected = (0.6 * plain[name] - 0.4 * few[name]) / (0.6 - 0.4)
        torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("names", [("plain", "dora"), ("plain", "wide")])
def test_full_rank_keeps_what_the_checkpoint_merge_gives(names, base, loras, tmp_path):
    spec = spec_of(base, loras, "ties", names, parameters={"density": 0.5})
    merge(spec | {"output": {"type": "adapter", "rank": "full"}}, tmp_path / "lora", quiet=True)
    merge(spec | {"output": {"type": "checkpoint"}}, tmp_path / "full", quiet=True)
    got = tiny.load_merged(base, tmp_path / "lora").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "full").state_dict()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_slerp_of_two_loras(base, loras, tmp_path):
    models = [{"model": str(loras["plain"])}, {"model": str(loras["wide"])}]
    spec = {"merge_method": "slerp", "base_model": str(base), "models": models, "parameters": {"t": 0.4}}
    merge(spec | {"output": {"type": "adapter", "rank": "full"}}, tmp_path / "lora", quiet=True)
    merge(spec, tmp_path / "full", quiet=True)
    got = tiny.load_merged(base, tmp_path / "lora").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "full").state_dict()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


def test_smaller_rank_is_the_best_one_and_its_error_is_reported(base, loras, tmp_path):
    spec = spec_of(base, loras, "task_arithmetic", ("plain", "wide"), output={"type": "adapter", "rank": 3})
    result = merge(spec, tmp_path / "out", quiet=True)
    got = deltas(base, tmp_path / "out")
    parts = [deltas(base, loras[n]) for n in ("plain", "wide")]
    for module, error in result.numbers["relative_error"].items():
        wanted = 0.6 * parts[0][f"{module}.weight"] - 0.4 * parts[1][f"{module}.weight"]
        s = torch.linalg.svdvals(wanted)
        best = (s[3:].norm() / s.norm()).item()  # Eckart and Young
        reached = ((got[f"{module}.weight"] - wanted).norm() / wanted.norm()).item()
        assert error == pytest.approx(best, rel=1e-3)
        assert reached == pytest.approx(best, rel=1e-3)
        assert open_adapter(tmp_path / "out").rank(module) == 3


def test_recompress_equals_factoring_the_product():
    rng = np.random.default_rng(0)
    rows, cols = (rng.standard_normal(s).astype(np.float32) for s in ((30, 6), (6, 20)))
    pair, error = recompress(LowRank(rows, cols, 0.7), 4)
    whole, whole_error = factor((0.7 * rows @ cols).astype(np.float32), 4, transposed=False)
    assert error == pytest.approx(whole_error, rel=1e-5)
    np.testing.assert_allclose(pair.rows @ pair.cols, whole.rows @ whole.cols, rtol=1e-4, atol=1e-5)


def test_stock_peft_loads_the_result(base, loras, tmp_path):
    merge(spec_of(base, loras, "task_arithmetic", ("plain", "patterns")), tmp_path / "out", quiet=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        attached = model(ids).logits
        folded = tiny.load_merged(base, tmp_path / "out")(ids).logits
    torch.testing.assert_close(attached, folded, rtol=1e-4, atol=1e-4)


def test_what_no_lora_can_hold_is_refused(base, loras, tmp_path):
    whole = tiny.save_lora(base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["lm_head"])
    full = tiny.save_model(tiny.llama(4), tmp_path / "full")
    spec = spec_of(base, loras | {"whole": whole, "full": full}, "task_arithmetic", ("plain", "whole", "full"))
    with pytest.raises(SpecError) as caught:
        merge(spec, tmp_path / "out", quiet=True)
    assert "models[1].model: stores lm_head.weight whole" in str(caught.value)
    assert "models[2].model: output.type is adapter, so every model must be a LoRA" in str(caught.value)


def test_nan_in_an_adapter_is_named(base, loras, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(loras["plain"], broken)
    stored = load_file(broken / "adapter_model.safetensors")
    name = sorted(stored)[3]
    stored[name][0, 2] = torch.nan
    save_file(stored, broken / "adapter_model.safetensors")
    spec = spec_of(base, loras | {"broken": broken}, "task_arithmetic", ("wide", "broken"))
    with pytest.raises(CheckpointError, match=f"broken: {re.escape(name)} holds NaN or infinity"):
        merge(spec, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", [{"type": "adapter"}, {"type": "compressed"}])
def test_a_change_of_a_merge_is_refused(output, base, loras, tmp_path):
    spec = spec_of(base, loras, "task_arithmetic", ("plain", "wide"), output=output)
    spec["base_model"] = {key: value for key, value in spec.items() if key != "output"}
    with pytest.raises(SpecError, match="base_model: is a merge, and a change of it could not name it"):
        merge(spec, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_base_that_joins_the_models_is_no_lora(base, loras, tmp_path):
    """It counts in the average, where its change is 0."""
    spec = spec_of(base, loras, "linear", ("plain",), models=[{"model": str(loras["plain"])}])
    merge(spec | {"parameters": {"weight": 1}}, tmp_path / "out", quiet=True)
    got, part = deltas(base, tmp_path / "out"), deltas(base, loras["plain"])
    for name, value in got.items():
        torch.testing.assert_close(value, part[name] / 2, rtol=1e-4, atol=1e-5)
