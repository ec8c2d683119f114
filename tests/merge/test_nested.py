"""Merges inside merges against the same merges run one after another, through files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import tiny
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.errors import SpecError
from toolkit.merge.plan import make_plan
from toolkit.merge.run import merge


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, str]:
    """A base and three full fine-tunes of it in bfloat16."""
    root = tmp_path_factory.mktemp("family")
    base = tiny.llama().to(torch.bfloat16)
    folders = {"base": str(tiny.save_model(base, root / "base"))}
    for i in range(3):
        folders[f"tuned{i}"] = str(tiny.save_model(tiny.tuned(base, i), root / f"tuned{i}"))
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def inner(family: dict[str, str], method: str, **changes: Any) -> dict[str, Any]:
    models = [{"model": family["tuned0"], "parameters": {"weight": 0.7}}, {"model": family["tuned1"]}]
    spec = {"merge_method": method, "base_model": family["base"], "models": models, "parameters": {"weight": 0.4}}
    if method in ("ties", "della"):
        spec["parameters"] |= {"density": 0.5}
    if method == "tsv":
        spec["parameters"] = {}
        models[0]["parameters"] = {}
    return spec | changes


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della", "model_stock", "tsv"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outer", ["linear", "ties"])
def test_one_pass_equals_two(method, dtype, outer, family, tmp_path):
    """Methods of every scope, with and without a pass over the tensor first, inside two others."""
    first = inner(family, method, dtype=dtype)
    if method == "model_stock":
        first["parameters"] = {}
        first["models"] = [{"model": family["tuned0"]}, {"model": family["tuned1"]}]
    merge(first, tmp_path / "first", quiet=True)

    def second(model: Any) -> dict[str, Any]:
        spec = {
            "merge_method": outer,
            "models": [{"model": model}, {"model": family["tuned2"]}],
            "parameters": {"weight": 0.5},
            "dtype": "float32",
        }
        return spec | ({"base_model": family["base"]} if outer == "ties" else {})

    merge(second(str(tmp_path / "first")), tmp_path / "two", quiet=True)
    merge(second(first), tmp_path / "one", quiet=True, workers=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in two.items():
        assert torch.equal(one[name], value), name


def test_without_a_dtype_nothing_is_rounded_in_between(family, tmp_path):
    outer = {"merge_method": "passthrough", "dtype": "float32"}
    merge(outer | {"models": [{"model": inner(family, "task_arithmetic")}]}, tmp_path / "nested", quiet=True)
    merge(inner(family, "task_arithmetic", dtype="float32"), tmp_path / "plain", quiet=True)
    plain = weights(tmp_path / "plain")
    for name, value in weights(tmp_path / "nested").items():
        assert torch.equal(value, plain[name])


def test_whole_model_surveys_and_loras_inside(base, loras, tmp_path):
    """The paper's TIES trims over the whole model, which is looked through before the first slice is read."""
    models = [{"model": str(loras[name])} for name in ("plain", "dora")]
    first = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": models,
        "parameters": {"preset": "paper", "density": 0.3},
    }
    merge(first | {"dtype": "float32"}, tmp_path / "first", quiet=True)
    for name, model in {"one": first, "two": str(tmp_path / "first")}.items():
        spec = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": model}]}
        merge(spec | {"parameters": {"weight": 0.5}, "dtype": "float32"}, tmp_path / name, quiet=True)
    two = weights(tmp_path / "two")
    for name, value in weights(tmp_path / "one").items():
        assert torch.equal(value, two[name])


def test_a_merge_can_be_the_base(family, tmp_path):
    base = inner(family, "task_arithmetic", dtype="bfloat16")
    merge(base, tmp_path / "base", quiet=True)
    for name, model in {"one": base, "two": str(tmp_path / "base")}.items():
        models = [{"model": family["tuned2"]}, {"model": model}]
        merge(
            {"merge_method": "slerp", "base_model": model, "models": models, "parameters": {"t": 0.3}}, tmp_path / name
        )
    two = weights(tmp_path / "two")
    for name, value in weights(tmp_path / "one").items():
        assert torch.equal(value, two[name])


def test_documents_name_each_other_as_in_mergekit_multi(family, tmp_path):
    first = inner(family, "ties") | {"name": "both"}
    second = {"merge_method": "linear", "models": [{"model": "both"}, {"model": family["tuned2"]}]}
    second |= {"parameters": {"weight": 1}, "dtype": "float32"}
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump_all([first, second], sort_keys=False))
    merge(path, tmp_path / "documents", quiet=True)
    del first["name"]
    second["models"][0]["model"] = first
    merge(second, tmp_path / "nested", quiet=True)
    nested = weights(tmp_path / "nested")
    for name, value in weights(tmp_path / "documents").items():
        assert torch.equal(value, nested[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("densty: 0.5", "line 5: models[0].model.parameters.densty: ties has no parameter 'densty'; did you mean"),
        ("density: 7", "line 5: models[0].model.parameters.density"),
    ],
)
def test_faults_inside_have_their_own_place(change, message, family, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(
        f"""name: both
merge_method: ties
base_model: {family["base"]}
models: [{{model: {family["tuned0"]}}}]
parameters: {{{change}}}
---
merge_method: linear
models: [{{model: both, parameters: {{weight: 1}}}}]
"""
    )
    with pytest.raises(SpecError) as caught:
        merge(path, tmp_path / "out", quiet=True)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([{"merge_method": "linear"}, {"merge_method": "linear"}], "name: required in each document but the last"),
        ([{"name": "a"}, {"name": "a"}, {"models": [{"model": "a"}]}], "two documents are called 'a'"),
        ([{"name": "a"}, {"models": [{"model": "b"}]}], "no later document merges 'a'"),
    ],
)
def test_documents_that_do_not_fit_together(documents, message, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    with pytest.raises(SpecError, match=message):
        make_plan(path)


def test_what_only_the_outer_merge_can_do_is_said(family, tmp_path):
    model = inner(family, "ties", chat_template="chatml")
    with pytest.raises(SpecError, match=r"models\[0\].model.chat_template: .* give it to the outer one"):
        make_plan({"merge_method": "passthrough", "models": [{"model": model}]})


def test_plan_counts_what_is_read_and_held(family):
    plain = make_plan(inner(family, "tsv"))
    nested = make_plan({"merge_method": "passthrough", "models": [{"model": inner(family, "tsv")}], "dtype": "float32"})
    assert nested.read_bytes == plain.read_bytes
    assert nested.memory_bytes > plain.memory_bytes
