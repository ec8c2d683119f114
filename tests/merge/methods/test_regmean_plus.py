"""RegMean++ against a merge layer by layer of whole transformers models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.merge.laws import Example
from tests.merge.methods.test_regmean import inner_products, rows_of
from toolkit.errors import UnsupportedError
from toolkit.merge.run import merge
from toolkit.merge.statistics.through import stack_of

EXAMPLE = Example({"weight": (0.5, 0.3, 0.2), "alpha": 0.8}, neutral={}, rtol=1e-4)


def test_whole_merge(tmp_path):
    """Whole models are run: below layer l they are the merge, from l on a model of its own."""
    models = [tiny.llama(num_hidden_layers=3)]
    models.append(tiny.tuned(models[0], 1, scale=0.2))
    folders = [str(tiny.save_model(model, tmp_path / f"model{i}")) for i, model in enumerate(models)]
    data = [rows_of(tmp_path, i) for i in range(2)]
    inputs = [{"model": folder, "data": rows} for folder, rows in zip(folders, data, strict=True)]
    spec = {"merge_method": "regmean_plus", "models": inputs, "parameters": {"alpha": 0.7, "ridge": 0}}
    merge(spec, tmp_path / "out", quiet=True)
    got = load_file(tmp_path / "out" / "model.safetensors")
    states = [load_file(Path(folder) / "model.safetensors") for folder in folders]
    merged = {name: (states[0][name] + states[1][name]).double() / 2 for name in states[0]}
    stages = [[name for name in merged if f"layers.{layer}." in name] for layer in range(3)] + [["lm_head.weight"]]
    for names in stages:
        later = set().union(*stages[stages.index(names) :])
        grams = []
        for state, folder, rows in zip(states, folders, data, strict=True):
            hybrid = tiny.llama(num_hidden_layers=3)
            hybrid.load_state_dict({n: state[n] if n in later else merged[n].float() for n in merged})
            grams.append(inner_products(hybrid, folder, rows))
        for name in names:
            layer = name.removesuffix(".weight")
            if layer in grams[0]:
                g, h = (0.7 * of_one[layer] + 0.3 * of_one[layer].diag().diag() for of_one in grams)
                a, b = (state[name].double().T for state in states)
                merged[name] = torch.linalg.solve(g + h, g @ a + h @ b).T
    for name, expected in merged.items():
        torch.testing.assert_close(got[name].double(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    merge(spec | {"merge_method": "regmean"}, tmp_path / "plain", quiet=True)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    assert not torch.allclose(plain[name], got[name], rtol=1e-2), "the layers below make a difference"


def test_a_model_without_a_stack_of_layers_is_refused():
    model = tiny.llama()
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedError, match="has no stack of layers to merge one by one; use regmean"):
        stack_of(model)
