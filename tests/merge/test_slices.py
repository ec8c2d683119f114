"""Models put together from layers and parts of others: right tensors, right config, mergekit's own output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.merge.laws import run_mergekit
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.errors import SpecError
from toolkit.merge.plan import make_plan
from toolkit.merge.run import merge


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("family")
    base = tiny.llama(num_hidden_layers=4)
    folders = {"base": tiny.save_model(base, root / "base")}
    return folders | {f"tuned{i}": tiny.save_model(tiny.tuned(base, i), root / f"tuned{i}") for i in range(2)}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name).float().numpy() for name in checkpoint.tensors}


def layer(state: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def frankenmerge(family) -> dict:
    sources = [("tuned0", [0, 3]), ("tuned1", [1, 4])]
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(family[m]), "layer_range": r}]} for m, r in sources],
        "dtype": "float32",
    }


def test_layers_of_two_models_one_after_the_other(family, tmp_path):
    result = merge(frankenmerge(family), tmp_path / "out", quiet=True)
    got, first, second = (tensors(f) for f in (result.path, family["tuned0"], family["tuned1"]))
    for number, (source, own) in enumerate([(first, 0), (first, 1), (first, 2), (second, 1), (second, 2), (second, 3)]):
        assert same(layer(got, number), layer(source, own)), number
    assert np.array_equal(got["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert np.array_equal(got[name], second[name])
    assert json.loads((result.path / "config.json").read_text())["num_hidden_layers"] == 6
    with torch.inference_mode():
        assert AutoModelForCausalLM.from_pretrained(result.path)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["frankenmerge", "slerp", "task_arithmetic", "linear", "gradient"])
def test_mergekit_gives_the_same(kind, family, tmp_path):
    """Where a merge has no gradient; mergekit gives the final norm and the head the first anchor, not the last."""
    both = [{"model": str(family[m]), "layer_range": [1, 4]} for m in ("base", "tuned0")]
    specs = {
        "frankenmerge": frankenmerge(family),
        "slerp": {
            "merge_method": "slerp",
            "base_model": str(family["base"]),
            "slices": [{"sources": both}],
            "parameters": {"t": 0.3},
        },
        "task_arithmetic": {
            "merge_method": "task_arithmetic",
            "base_model": str(family["base"]),
            "slices": [
                {"sources": both, "parameters": {"weight": 0.5}},
                {"sources": [dict(both[0]), dict(both[1]) | {"parameters": {"weight": 0.25}}]},
            ],
            "parameters": {"weight": 0.75},
        },
        "linear": {
            "merge_method": "linear",
            "models": [{"model": str(family[f"tuned{i}"]), "parameters": {"weight": 1 + i}} for i in range(2)],
        },
        "gradient": {
            "merge_method": "linear",
            "models": [
                {
                    "model": str(family["tuned0"]),
                    "parameters": {"weight": [{"filter": "mlp", "value": [0.5, 1, 3]}, {"value": 1}]},
                },
                {"model": str(family["tuned1"]), "parameters": {"weight": 1}},
            ],
        },
    }
    spec = specs[kind] | {"dtype": "float32"}
    got = tensors(merge(spec, tmp_path / "ours", quiet=True).path)
    expected = tensors(run_mergekit(spec, tmp_path / "mergekit"))
    assert got.keys() == expected.keys()
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    ours, theirs = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "mergekit"))
    assert ours["num_hidden_layers"] == theirs["num_hidden_layers"]


def test_anchors_are_spread_over_each_slice(family, tmp_path):
    both = [{"model": str(family[m]), "layer_range": [0, 2]} for m in ("base", "tuned0")]
    spec = {
        "merge_method": "slerp",
        "base_model": str(family["base"]),
        "slices": [{"sources": both, "parameters": {"t": [0.0, 1.0]}}, {"sources": both, "parameters": {"t": 0.0}}],
    }
    got = tensors(merge(spec, tmp_path / "out", quiet=True).path)
    base, tuned = tensors(family["base"]), tensors(family["tuned0"])
    for number, expected in enumerate([layer(base, 0), layer(tuned, 1), layer(base, 0), layer(base, 1)]):
        assert same(layer(got, number), expected), number


def test_modules_are_merged_apart_and_the_rest_is_the_base(family, tmp_path):
    spec = {
        "merge_method": "linear",
        "base_model": str(family["base"]),
        "modules": {
            "model.layers": {"models": [{"model": str(family["tuned0"]), "parameters": {"weight": 1}}]},
            "lm_head": {"models": [{"model": str(family["tuned1"]), "parameters": {"weight": 1}}]},
        },
    }
    got, base, first, second = (tensors(f) for f in (merge(spec, tmp_path / "out", quiet=True).path, *family.values()))
    for name, value in got.items():
        source = first if ".layers." in name else second if name.startswith("lm_head") else base
        assert np.array_equal(value, source[name]), name
    everything = {"merge_method": "linear", "modules": {"default": spec["modules"]["model.layers"]}}
    assert same(tensors(merge(everything, tmp_path / "default", quiet=True).path), first)


def test_all_faults_of_slices_at_once_with_their_lines(family, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(
        f"""merge_method: linear
slices:
  - sources:
      - model: {family["tuned0"]}
        layer_range: [2, 5]
        parameters: {{weight: 1}}
      - model: {family["tuned1"]}
        layer_range: [0, 2]
        parameters: {{weight: 1}}
  - sources:
      - model: {family["tuned1"]}
        layer_range: [0, 1]
        parameters: {{weight: 1}}
    parameters: {{normalise: true}}
"""
    )
    with pytest.raises(SpecError) as caught:
        make_plan(path)
    assert "line 14: slices[1].parameters.normalise: linear has no parameter 'normalise'; did you mean" in str(
        caught.value
    )
    spec = yaml.safe_load(path.read_text())
    del spec["slices"][1]["parameters"]
    with pytest.raises(SpecError) as caught:
        make_plan(spec)
    text = str(caught.value)
    assert "slices[0].sources[0].layer_range: [2, 5], but the model has 4 layers" in text
    assert "slices[0].sources: the layer ranges differ in length ([2, 5], [0, 2])" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": [{"model": "x"}]}, "give one of models, slices and modules, got models and slices"),
        ({"slices": [{"sources": [{"model": "x", "layer_range": [3, 3]}]}]}, "the range [3, 3] holds no layer"),
        ({"slices": None, "modules": {"vision": {}}}, "modules.vision: give either models or slices"),
    ],
)
def test_bad_forms(change, message, family):
    with pytest.raises(SpecError) as caught:
        make_plan(frankenmerge(family) | change)
    assert message in str(caught.value)


def test_unknown_module_is_answered_with_those_that_are_there(family):
    models = [{"model": str(family["tuned0"]), "parameters": {"weight": 1}}]
    with pytest.raises(SpecError, match=r"modules\.vision: no tensor's name begins so \(there are .*model"):
        make_plan({"merge_method": "linear", "modules": {"vision": {"models": models}}})
