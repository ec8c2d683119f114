"""Merge specs as mergekit's users write them: references as mergekit reads them, faults of all kinds at once."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from toolkit.errors import SpecError
from toolkit.merge.plan import make_plan
from toolkit.merge.run import merge
from toolkit.merge.spec import InputSpec

REFERENCES = [
    {"model": "org/name"},
    {"model": {"path": "org/name"}},
    {"model": {"path": "org/name", "revision": "v1"}},
    {"model": {"path": "org/name", "revision": None}, "lora": None},
    {"model": "org/name@v1", "lora": {"path": "org/lora", "revision": "main"}},
    {"model": {"path": "a/b"}, "lora": "c/d"},
]


@pytest.mark.parametrize("reference", REFERENCES)
def test_references_that_are_spelled_out(reference):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.common import ModelReference
    assert InputSpec(model=reference).model == str(ModelReference.model_validate(reference))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"model": "a/b", "override_architecture": "X"}, "'override_architecture' is not supported"),
        ({"model": {"path": "a/b", "branch": "x"}}, "expected a path, or path and revision"),
        ({"model": 3}, "expected a path, or path and revision, got 3"),
    ],
)
def test_references_that_are_wrong(reference, message):
    with pytest.raises(ValueError, match=message):
        InputSpec(model=reference)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, Path]:
    """Three models of one shape, of which `shuffled` numbers its tokens in another order, and a narrower one."""
    root = tmp_path_factory.mktemp("family")
    base = tiny.llama(num_hidden_layers=2)
    folders = {"base": tiny.save_model(base, root / "base"), "tuned": tiny.save_model(tiny.tuned(base, 0), root / "t")}
    folders["narrow"] = tiny.save_model(tiny.llama(num_hidden_layers=2, hidden_size=32), root / "narrow")
    folders["shuffled"] = shutil.copytree(folders["tuned"], root / "shuffled")
    _renumber(folders["shuffled"], 100)
    folders["chat"] = shutil.copytree(folders["tuned"], root / "chat")
    _renumber(folders["chat"], 2)
    return folders


def _renumber(folder: Path, count: int) -> None:
    """Exchange the ids of a tokenizer's first tokens, in reverse order."""
    data = json.loads((folder / "tokenizer.json").read_text())
    known = data["model"]["vocab"]
    tokens = list(known)[:count]
    known.update(zip(tokens, [known[token] for token in reversed(tokens)], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(data))


def spec_of(family: dict[str, Path], method: str, *names: str, **changes: Any) -> dict[str, Any]:
    models = [{"model": str(family.get(name, name)), "parameters": {"weight": 0.5}} for name in names]
    return {"merge_method": method, "models": models} | changes


def faults(spec: dict[str, Any], tmp_path: Path) -> dict[str, str]:
    """Return what a merge finds wrong by key path; it writes nothing."""
    with pytest.raises(SpecError) as caught:
        merge(spec, tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []
    return {problem.where: problem.message for problem in caught.value.problems}


def test_an_unknown_method_hides_no_other_fault(family, tmp_path):
    spec = spec_of(family, "tise", "tuned", "narrow", "/nowhere", dtype="float61", chat_template="chatmll")
    found = faults(spec, tmp_path)
    assert list(found) == ["merge_method", "dtype", "models[2].model", "models[1].model", "chat_template"]
    assert "did you mean 'ties'" in found["merge_method"]
    assert "shape [262, 32], but [262, 48]" in found["models[1].model"]


def test_parameters_shapes_and_a_missing_base_are_told_together(family, tmp_path):
    spec = spec_of(family, "ties", "tuned", "narrow")
    spec["models"][0]["parameters"]["density"] = 7
    found = faults(spec, tmp_path)
    assert list(found) == ["base_model", "models[1].model", "models[0].parameters.density"]
    spec["models"][0]["parameters"]["densty"] = 1
    assert list(faults(spec, tmp_path)) == ["models[0].parameters.densty", "base_model", "models[1].model"]


def test_layers_and_parameters_of_slices_are_told_together(family, tmp_path):
    model = str(family["tuned"])
    slices = [
        {"sources": [{"model": model, "layer_range": [0, 9]}], "parameters": {"wieght": 1}},
        {"sources": [{"model": model, "layer_range": [0, 1]}, {"model": "/nowhere", "layer_range": [0, 1]}]},
    ]
    found = faults({"merge_method": "linear", "slices": slices}, tmp_path)
    assert list(found) == [
        "slices[0].parameters.wieght",
        "slices[1].sources[1].model",
        "slices[0].sources[0].layer_range",
    ]


def test_values_that_no_key_is_to_blame_for_are_their_models(family, tmp_path):
    spec = spec_of(family, "linear", "base", "tuned", parameters={"weight": 0})
    for model in spec["models"]:
        del model["parameters"]
    assert faults(spec, tmp_path) == {"models": "the weights sum to 0, which cannot be normalized"}


def test_two_tokenizers_are_told_although_all_shapes_agree(family, tmp_path):
    found = faults(spec_of(family, "linear", "base", "shuffled"), tmp_path)
    assert list(found) == ["models[1].model"]
    message = "its vocabulary is another: 100 of 262 tokens have ids that mean other tokens in"
    assert found["models[1].model"].startswith(message)
    assert found["models[1].model"].endswith("; a tokenizer block merges models token by token")
    make_plan(spec_of(family, "linear", "base", "shuffled", tokenizer={"source": "base"})).inputs.close()
    make_plan(spec_of(family, "linear", "base", "chat")).inputs.close()  # a few renamed tokens are what chat models do


def test_tokens_matter_only_where_rows_of_tokens_are_merged(family, tmp_path):
    """Layers of a model with other tokens may stand between those of one whose embeddings and head are taken."""
    names = (("base", [0, 1]), ("shuffled", [0, 2]), ("base", [1, 2]))
    slices = [{"sources": [{"model": str(family[name]), "layer_range": layers}]} for name, layers in names]
    make_plan({"merge_method": "passthrough", "slices": slices}).inputs.close()
    found = faults({"merge_method": "passthrough", "slices": slices[:2]}, tmp_path)
    assert list(found) == ["slices[1].sources[0].model"]
    assert "its vocabulary is another" in found["slices[1].sources[0].model"]


def test_vocabularies_of_other_sizes_say_what_to_do(family, tmp_path):
    wide = tiny.save_model(tiny.llama(num_hidden_layers=2, vocab_size=270), tmp_path / "models" / "wide")
    with pytest.raises(SpecError, match=r"shape \[270, 48\], but \[262, 48\] .*; a tokenizer block merges models"):
        make_plan(spec_of(family, "linear", "base", str(wide)))
