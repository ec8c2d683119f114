"""A whole merge from folders to a folder: right values, same bytes however it is run, nothing lost when killed."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from tests import tiny
from tests.merge.laws import run_mergekit
from toolkit.checkpoints.compressed import on_base, open_compressed
from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.reader import INDEX, open_checkpoint
from toolkit.cli import main
from toolkit.errors import MissingError, OutputError, SpecError
from toolkit.merge import run as run_module
from toolkit.merge.plan import make_plan
from toolkit.merge.run import merge

WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, Path]:
    """A base and three full fine-tunes of it, bfloat16 in several shards."""
    root = tmp_path_factory.mktemp("family")
    base = tiny.llama().to(torch.bfloat16)
    folders = {"base": tiny.save_model(base, root / "base", max_shard_size="60KB")}
    for i in range(3):
        folders[f"tuned{i}"] = tiny.save_model(tiny.tuned(base, i), root / f"tuned{i}", max_shard_size="90KB")
    return folders


def spec_of(family: dict[str, Path], method: str, **changes: Any) -> dict[str, Any]:
    models = [{"model": str(family[f"tuned{i}"]), "parameters": {"weight": w}} for i, w in enumerate(WEIGHTS)]
    spec: dict[str, Any] = {"merge_method": method, "base_model": str(family["base"]), "models": models}
    if method == "ties":
        spec["parameters"] = {"density": 0.4}
    if method == "slerp":
        spec["models"] = [{"model": str(family["tuned0"])}, {"model": str(family["base"])}]
        spec["parameters"] = {"t": 0.3}
    return spec | changes


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an output but the card, which says when libraries changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_values_of_each_method(family, tmp_path):
    parts = {name: {k: v.double() for k, v in tensors(folder).items()} for name, folder in family.items()}
    base, tuned = parts["base"], [parts[f"tuned{i}"] for i in range(3)]
    expected = {
        "linear": {k: sum(w * t[k] for w, t in zip(WEIGHTS, tuned, strict=True)) for k in base},
        "task_arithmetic": {
            k: base[k] + sum(w * (t[k] - base[k]) for w, t in zip(WEIGHTS, tuned, strict=True)) for k in base
        },
        "slerp": {k: _slerp(base[k], tuned[0][k], 0.3) for k in base},
    }
    for method, wanted in expected.items():
        result = merge(spec_of(family, method), tmp_path / method, quiet=True)
        got = tensors(result.path)
        assert set(got) == set(wanted)
        for name, value in wanted.items():
            assert got[name].dtype == torch.bfloat16
            # Computed in float32 and rounded once: at most one rounding step from the exact value.
            np.testing.assert_allclose(got[name].double(), value, rtol=2**-8, atol=1e-7)
            exact = value.to(torch.bfloat16) == got[name]
            assert exact.float().mean() > 0.99


def _slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Interpolate from the base (t = 0), although the spec lists it second."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    if cosine.abs() > 0.9995:
        return (1 - t) * a + t * b
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def test_output_is_a_model_that_loads_and_says_what_it_is(family, tmp_path):
    result = merge(spec_of(family, "ties", dtype="float32"), tmp_path / "out", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(result.path)
    assert model.dtype == torch.float32
    assert json.loads((result.path / "config.json").read_text())["dtype"] == "float32"
    assert AutoTokenizer.from_pretrained(result.path).chat_template
    card = (result.path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == [str(family["base"])]
    assert "merge_method: ties" in card
    assert "tuned2" in card
    assert result.to_dict()["tensors"] == len(tensors(family["base"]))
    assert result.non_finite == []


@pytest.mark.parametrize("method", ["slerp", "nearswap"])
def test_base_that_is_not_listed_is_the_first_model(method, family, tmp_path):
    tuned = {"model": str(family["tuned0"])}
    spec = {"merge_method": method, "base_model": str(family["base"]), "models": [tuned], "parameters": {"t": 0.01}}
    listed = spec | {"models": [tuned, {"model": str(family["base"])}]}
    got, expected = (merge(s, tmp_path / n, quiet=True).path for n, s in (("got", spec), ("expected", listed)))
    assert all(torch.equal(value, tensors(expected)[name]) for name, value in tensors(got).items())


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp"])
def test_same_bytes_however_it_is_run(method, family, tmp_path):
    spec = spec_of(family, method)
    first = content(merge(spec, tmp_path / "first", quiet=True, workers=1).path)
    again = content(merge(spec, tmp_path / "again", quiet=True, workers=3).path)
    assert first == again
    sharded = merge(spec, tmp_path / "sharded", quiet=True, workers=2, shard_bytes=40_000).path
    assert (sharded / INDEX).is_file()
    whole, parts = tensors(tmp_path / "first"), tensors(sharded)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_shard_is_opened_once(workers, family, tmp_path, monkeypatch):
    opened: list[str] = []
    plain = os.open

    def noted(path: Any, *rest: Any, **options: Any) -> int:
        opened.append(str(path))
        return plain(path, *rest, **options)

    monkeypatch.setattr(os, "open", noted)
    merge(spec_of(family, "ties"), tmp_path / "out", workers=workers, quiet=True)
    shards = [str(file) for folder in family.values() for file in folder.glob("*.safetensors")]
    assert len(shards) > 8
    assert sorted(path for path in opened if path in shards) == sorted(shards)


def test_same_bytes_for_any_hash_seed(family, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec_of(family, "ties")))
    outputs = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        environment = dict(os.environ, PYTHONHASHSEED=seed)
        subprocess.run([sys.executable, "-m", "toolkit", "merge", path, out, "-q"], check=True, env=environment)
        outputs.append(content(out))
    assert outputs[0] == outputs[1]


def test_parameters_by_layer_and_by_name(family, tmp_path):
    spec = spec_of(family, "linear")
    spec["models"] = spec["models"][:2]
    spec["models"][0]["parameters"]["weight"] = [
        {"filter": "self_attn", "value": [0.0, 1.0]},
        {"filter": "re:mlp.up", "value": 1},
        {"value": 0},
    ]
    spec["models"][1]["parameters"]["weight"] = [
        {"filter": "*self_attn*", "value": [1.0, 0.0]},
        {"filter": "mlp.up", "value": 0},
        {"value": 1},
    ]
    got = tensors(merge(spec, tmp_path / "out", quiet=True).path)
    a, b = tensors(family["tuned0"]), tensors(family["tuned1"])
    for name, value in got.items():
        if "mlp.up" in name or ("layers.2" in name and "self_attn" in name):
            assert torch.equal(value, a[name]), name
        elif "self_attn" not in name or "layers.0" in name:
            assert torch.equal(value, b[name]), name
        else:
            middle = (a[name].double() + b[name].double()) / 2
            np.testing.assert_allclose(value.double(), middle, rtol=2**-8, atol=1e-7)


def test_last_anchor_reaches_the_final_norm_and_the_head(family, tmp_path):
    spec = spec_of(family, "slerp", parameters={"t": [0.0, 1.0]})
    got = tensors(merge(spec, tmp_path / "out", quiet=True).path)
    base, tuned = tensors(family["base"]), tensors(family["tuned0"])
    assert torch.equal(got["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert torch.equal(got["model.norm.weight"], tuned["model.norm.weight"])
    assert torch.equal(got["lm_head.weight"], tuned["lm_head.weight"])


def test_models_in_memory_and_loras_and_folders_in_one_merge(base, loras, tmp_path):
    model = tiny.tuned(tiny.llama(), 5)
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [
            {"model": str(loras["dora"]), "parameters": {"weight": 0.5}},
            {"model": model, "parameters": {"weight": 0.25}},
            {"model": f"{base}+{loras['rslora']}"},
        ],
    }
    got = tensors(toolkit.merge(spec, tmp_path / "out", quiet=True).path)
    start = tensors(base)
    dora, rs = (tiny.load_merged(base, loras[k]).state_dict() for k in ("dora", "rslora"))
    for name, value in got.items():
        b = start[name].double()
        expected = b + 0.5 * (dora[name] - b) + 0.25 * (model.state_dict()[name] - b) + (rs[name] - b)
        np.testing.assert_allclose(value.double(), expected, rtol=1e-4, atol=1e-5)


def test_tensors_that_no_lora_touches_are_the_base_bit_for_bit(base, loras, tmp_path):
    models = [
        {"model": str(loras["few"]), "parameters": {"weight": 0.3}},
        {"model": str(loras["few"]), "parameters": {"weight": 0.9}},
    ]
    for method in ("linear", "ties"):
        got = tensors(
            merge(
                {"merge_method": method, "base_model": str(base), "models": models}, tmp_path / method, quiet=True
            ).path
        )
        start = tensors(base)
        changed = {name for name in got if not torch.equal(got[name], start[name])}
        assert changed == {n for n in start if "q_proj" in n or "down_proj" in n}


@pytest.mark.parametrize("kind", ["svd", "mask", "bit"])
def test_compressed_deltas_are_models(kind, family, tmp_path):
    """As the full weights that they stand for, written out, are; alone, by name, and on a base of their own."""
    tuned = {name: str(family[name]) for name in ("tuned0", "tuned1")}
    toolkit.extract(str(family["base"]), tuned, tmp_path / "small", kind=kind, quiet=True)
    base = open_checkpoint(family["base"])
    for name in tuned:
        full = on_base(base, open_compressed(f"{tmp_path / 'small'}#{name}"))
        (tmp_path / name).mkdir()
        state = {n: torch.empty(t.shape) for n, t in base.tensors.items()}
        for tensor, value in state.items():
            for start, stop in chunks(tuple(value.shape)):
                full.read(tensor, start, stop, value.view(-1).numpy()[start:stop])
        save_file(state, tmp_path / name / "model.safetensors")
    forms = {
        "whole": [str(tmp_path / "tuned0"), str(tmp_path / "tuned1")],
        "own base": [f"{family['base']}+{tmp_path / 'small'}#{name}" for name in tuned],
        "on the base": [f"{tmp_path / 'small'}#{name}" for name in tuned],
    }
    got = {}
    for i, (form, models) in enumerate(forms.items()):
        inputs = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
        spec = {"merge_method": "ties", "base_model": str(family["base"]), "models": inputs, "dtype": "float32"}
        got[form] = tensors(merge(spec | {"parameters": {"density": 0.5}}, tmp_path / f"out{i}", quiet=True).path)
    for name, value in got["whole"].items():
        torch.testing.assert_close(got["own base"][name], value, rtol=0, atol=1e-7)
        # A change that is stored as such is not rounded to the weights' grid first, so ties may be cut elsewhere.
        close = torch.isclose(got["on the base"][name], value, rtol=0, atol=1e-6)
        assert close.float().mean() > 0.99, name


def test_a_folder_of_several_fine_tunes_must_say_which(family, tmp_path):
    tuned = {name: str(family[name]) for name in ("tuned0", "tuned1")}
    toolkit.extract(str(family["base"]), tuned, tmp_path / "small", kind="bit", quiet=True)
    spec = {"merge_method": "task_arithmetic", "base_model": str(family["base"])}
    with pytest.raises(SpecError, match=r"models\[0\].model: .*tuned0, tuned1"):
        make_plan(spec | {"models": [{"model": str(tmp_path / "small")}]})
    with pytest.raises(SpecError, match="no fine-tune 'tuned7'"):
        make_plan(spec | {"models": [{"model": f"{tmp_path / 'small'}#tuned7"}]})


@pytest.mark.parametrize("options", [{}, {"as": "svd", "rank": 4}, {"as": "lora", "energy": 0.9}])
def test_a_merge_as_a_small_change_of_its_base(options, family, tmp_path):
    """What `toolkit extract` makes of the merge that was written."""
    spec = spec_of(family, "task_arithmetic", dtype="float32")
    result = merge(spec | {"output": {"type": "compressed", **options}}, tmp_path / "small", quiet=True)
    merge(spec, tmp_path / "full", quiet=True)
    kind = options.pop("as", "bit")
    expected = toolkit.extract(
        str(family["base"]), {"merged": str(tmp_path / "full")}, tmp_path / "expected", kind=kind, quiet=True, **options
    )
    files = [path.name for path in sorted((tmp_path / "expected").glob("*.safetensors"))]
    assert files
    for name in files:
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert result.path == tmp_path / "small"
    assert result.numbers["relative_error"] == expected.numbers["relative_error"]
    with pytest.raises(SpecError, match="base_model: required: the output is a change of it"):
        merge(
            {"merge_method": "linear", "models": [], "output": {"type": "compressed"}}
            | {"models": [{"model": str(family["base"]), "parameters": {"weight": 1}}]},
            tmp_path / "none",
        )


def test_options_of_another_output_are_errors(family, tmp_path):
    with pytest.raises(SpecError, match="output: energy is an option of type compressed, not of adapter"):
        merge(spec_of(family, "linear", output={"type": "adapter", "energy": 0.5}), tmp_path / "out")


def test_adapters_find_their_own_base(base, loras, tmp_path):
    spec = {"merge_method": "task_arithmetic", "models": [{"model": str(loras["plain"])}]}
    got = tensors(merge(spec, tmp_path / "out", quiet=True).path)
    expected = tiny.load_merged(base, loras["plain"]).state_dict()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_tied_heads_stay_tied_and_mixed_ones_come_apart(tmp_path):
    tied = tiny.save_model(tiny.llama(1, tie_word_embeddings=True), tmp_path / "tied")
    tied_too = tiny.save_model(tiny.llama(2, tie_word_embeddings=True), tmp_path / "tied_too")
    apart = tiny.save_model(tiny.llama(3), tmp_path / "apart")
    same = {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "models": [{"model": str(tied)}, {"model": str(tied_too)}],
    }
    merge(same, tmp_path / "same", quiet=True)
    assert "lm_head.weight" not in tensors(tmp_path / "same")
    mixed = same | {"models": [{"model": str(tied)}, {"model": str(apart)}]}
    merge(mixed, tmp_path / "mixed", quiet=True)
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    expected = (tensors(tied)["model.embed_tokens.weight"] + tensors(apart)["lm_head.weight"]) / 2
    torch.testing.assert_close(tensors(tmp_path / "mixed")["lm_head.weight"], expected)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("method", "parameters"), [("linear", {"weight": 0.7}), ("karcher", {"tol": 1e-9})])
def test_a_base_is_one_more_model_where_mergekit_has_it_so(method, parameters, listed, family, tmp_path):
    names = ["base", "tuned0", "tuned1"] if listed else ["tuned0", "tuned1"]
    spec = {
        "merge_method": method,
        "base_model": str(family["base"]),
        "models": [{"model": str(family[name])} for name in names],
        "parameters": parameters,
        "dtype": "float32",
    }
    ours = tensors(merge(spec, tmp_path / "ours", quiet=True).path)
    theirs = tensors(run_mergekit(spec, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=2e-6)


def test_a_base_without_a_weight_is_the_donor_only(family, tmp_path):
    spec = spec_of(family, "linear")
    with_it = tensors(merge(spec, tmp_path / "a", quiet=True).path)
    del spec["base_model"]
    without = tensors(merge(spec, tmp_path / "b", quiet=True).path)
    assert all(torch.equal(value, without[name]) for name, value in with_it.items())


def test_non_finite_outputs_are_named(family, tmp_path):
    broken = tiny.llama().to(torch.bfloat16)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
        broken.model.norm.weight[0] = float("inf")
    spec = spec_of(family, "linear")
    spec["models"][1]["model"] = str(tiny.save_model(broken, tmp_path / "broken"))
    result = merge(spec, tmp_path / "out", quiet=True)
    assert result.non_finite == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    assert result.non_finite_inputs == {str(tmp_path / "broken"): result.non_finite}
    merge({"merge_method": "passthrough", "models": [{"model": str(tmp_path / "broken")}]}, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "merge.json").read_text())["non_finite"] == result.non_finite


HIDING = {
    "arcee_fusion": {},  # takes no element whose importance is not a number
    "nearswap": {"t": 1e-4},  # moves by `t` at most
    "ties": {"vote": "frequency"},  # erases what two others outvote
}
"""Methods that keep an infinity of an input out of the output."""


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", HIDING)
def test_infinity_in_an_input_is_named_where_it_does_not_reach_the_output(method, nested, device, family, tmp_path):
    broken, name = tiny.tuned(tiny.llama().to(torch.bfloat16), 0), "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")  # where the two others are negative
    source = str(tiny.save_model(broken, tmp_path / "broken"))
    models = [{"model": source}]
    if method == "ties":
        models += [{"model": str(family["tuned1"])}, {"model": str(family["tuned2"])}]
    spec = {
        "merge_method": method,
        "base_model": str(family["base"]),
        "models": models,
        "parameters": HIDING[method],
    }
    if nested:
        outer = [
            {"model": spec, "parameters": {"weight": 1}},
            {"model": str(family["tuned2"]), "parameters": {"weight": 2}},
        ]
        spec = {"merge_method": "linear", "models": outer}
    result = merge(spec, tmp_path / "out", quiet=True, device=device)
    assert result.non_finite == []
    assert result.non_finite_inputs == {source: [name]}
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["non_finite_inputs"] == {source: [name]}
    assert [row for row in result.tables[0].rows if "NaN" in str(row[0])] == [
        ["NaN or infinity in an input", f"{source}: {name}"]
    ]


def test_results_too_large_for_their_dtype_are_named_and_blamed_on_no_input(family, tmp_path):
    spec = {"merge_method": "passthrough", "models": [{"model": str(family["base"])}], "dtype": "float16"}
    scale = [{"filter": "layers.0.mlp.up_proj", "value": 1e7}, {"value": 1}]
    result = merge(spec | {"parameters": {"scale": scale}}, tmp_path / "out", quiet=True)
    assert result.non_finite == ["model.layers.0.mlp.up_proj.weight"]
    assert result.non_finite_inputs == {}


def test_all_errors_of_a_spec_at_once_with_their_lines(family, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(
        f"""merge_method: ties
base_model: {family["base"]}
models:
  - model: {family["tuned0"]}
    parameters: {{weight: 0.5, densty: 0.3}}
  - model: {tmp_path}/absent
    parameters: {{weight: [{{filter: mlp, valu: 1}}]}}
  - model: {family["tuned1"]}
    parameters: {{normalize: true}}
parameters: {{lambda: []}}
dtype: float61
"""
    )
    with pytest.raises(SpecError) as caught:
        merge(path, tmp_path / "out", quiet=True)
    text = str(caught.value)
    for part in (
        "line 5: models[0].parameters.densty: ties has no parameter 'densty'; did you mean 'density'?",
        "line 6: models[1].model",
        "line 7: models[1].parameters.weight: unknown key 'valu'",
        "line 9: models[2].parameters.normalize: 'normalize' is one value for all models",
        "line 10: parameters.lambda: an empty list",
        "line 11: dtype: unknown dtype 'float61'",
    ):
        assert part in text
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "lineer"}, "did you mean 'linear'"),
        ({"base_model": None, "merge_method": "task_arithmetic"}, "base_model: required by task_arithmetic"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "models: slerp takes exactly 2, got 3"),
        ({"merge_method": "linear", "models": [{"model": "x/y/z"}]}, "x/y/z: no such folder"),
        ({"densty": 0.3}, "densty: unknown key 'densty'"),
        ({"models": []}, "models: List should have at least 1 item"),
        ({"output": {"type": "adapter"}}, "every model must be a LoRA folder"),
    ],
)
def test_bad_specs(change, message, family, tmp_path):
    spec = spec_of(family, "linear") | change
    for model in spec["models"]:
        if spec["merge_method"] == "slerp":
            model["parameters"] = {}
    with pytest.raises(SpecError) as caught:
        merge(spec, tmp_path / "out", quiet=True)
    assert message in str(caught.value)


def test_models_that_do_not_fit(family, tmp_path):
    other = tiny.save_model(tiny.llama(hidden_size=32, num_hidden_layers=2), tmp_path / "other")
    spec = spec_of(family, "linear")
    spec["models"][1]["model"] = str(other)
    with pytest.raises(SpecError) as caught:
        merge(spec, tmp_path / "out", quiet=True)
    text = str(caught.value)
    assert "models[1].model: lacks model.layers.2" in text
    assert "shape [262, 32], but [262, 48]" in text


def test_value_out_of_range_names_its_place(family, tmp_path):
    spec = spec_of(family, "ties")
    spec["models"][2]["parameters"]["density"] = 1.5
    with pytest.raises(SpecError, match=r"models\[2\]\.parameters\.density: Input should be less than or equal to 1"):
        merge(spec, tmp_path / "out", quiet=True)
    missing = spec_of(family, "linear")
    del missing["models"][1]["parameters"]
    with pytest.raises(SpecError, match=r"models\[1\]\.parameters\.weight: required by linear"):
        merge(missing, tmp_path / "out", quiet=True)


def test_plan_reads_no_weights_and_counts_them(family, tmp_path):
    plan = make_plan(spec_of(family, "ties"), shard_bytes=50_000)
    total = sum(t.nbytes for t in tensors(family["base"]).values())
    assert plan.write_bytes == total
    assert plan.read_bytes == 4 * total
    assert len(plan.shards) > 3
    assert {job.action for job in plan.jobs} == {"merge"}
    assert plan.to_dict()["tensors"][0]["parameters"]["density"] == (0.4, 0.4, 0.4)
    assert "ties" in plan.table().to_markdown()


KILLED = """
import sys, time
import toolkit.merge.run as run
slow = run._Worker.run
def patched(self, job):
    time.sleep(0.01)
    return slow(self, job)
run._Worker.run = patched
run.FLUSH_EVERY = 0.02
run.merge(sys.argv[1], sys.argv[2], quiet=True, workers=2, shard_bytes=60_000)
"""


def killed_after(spec: Path, out: Path, finished: int, pause: float) -> None:
    """Start a merge and kill it some time after its journal names a number of tensors."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(spec), str(out)])
    journal = out.parent / f".{out.name}.partial" / "journal.jsonl"
    while not journal.is_file() or journal.read_text().count(": true") < finished:
        time.sleep(0.002)
        assert process.poll() is None
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.wait()


def check_kills(family, tmp_path, moments: int) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(spec_of(family, "ties")))
    undisturbed = merge(spec, tmp_path / "undisturbed", quiet=True, shard_bytes=60_000)
    rng = random.Random(0)
    for i in range(moments):
        out = tmp_path / f"killed{i}"
        killed_after(spec, out, rng.randrange(undisturbed.numbers["tensors"] - 8), rng.uniform(0, 0.03))
        assert not out.exists()
        merge(spec, out, quiet=True, resume=True, workers=1, shard_bytes=60_000)
        assert content(out) == content(undisturbed.path)
        assert not list(out.parent.glob(f".{out.name}*"))


def test_killed_merge_resumes_to_the_same_bytes(family, tmp_path):
    check_kills(family, tmp_path, 3)


@pytest.mark.slow
def test_merge_killed_twenty_times(family, tmp_path):
    check_kills(family, tmp_path, 20)


def test_resume_refuses_what_changed_since(family, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(spec_of(family, "ties")))
    killed_after(spec, tmp_path / "out", finished=2, pause=0)
    other = spec_of(family, "ties") | {"parameters": {"density": 0.6}}
    with pytest.raises(OutputError, match="another spec or of inputs that changed"):
        merge(other, tmp_path / "out", quiet=True, resume=True, shard_bytes=60_000)
    merge(other, tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_input_that_disappears_leaves_no_half_model(family, tmp_path, monkeypatch):
    import toolkit.merge.run as run

    copy = tiny.save_model(tiny.llama().to(torch.bfloat16), tmp_path / "copy")
    spec = spec_of(family, "linear")
    spec["models"][0]["model"] = str(copy)
    real = run._Worker.run

    def shrinking(self, job):
        os.truncate(copy / "model.safetensors", 500)
        return real(self, job)

    monkeypatch.setattr(run._Worker, "run", shrinking)
    with pytest.raises(ValueError, match="became shorter"):
        merge(spec, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_no_half_model_and_what_was_done_is_kept(call, family, tmp_path, monkeypatch, capsys):
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(spec_of(family, "ties")))
    real, calls = getattr(os, call), []

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if call == "posix_fallocate" or len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    monkeypatch.setattr(run_module, "FLUSH_EVERY", 0.0)
    assert main(["merge", str(spec), str(tmp_path / "out"), "-q", "-j", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(os, call, real)
    assert main(["merge", str(spec), str(tmp_path / "out"), "-q", "--resume"]) == 0
    merge(spec, tmp_path / "whole", quiet=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_missing_spec_file(tmp_path):
    with pytest.raises(MissingError, match="no such spec file"):
        merge(tmp_path / "absent.yaml", tmp_path / "out")


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    """Merge 600 MB with one tensor of 300 MB, and stay far below either."""
    from safetensors.numpy import save_file

    big = {
        "model.embed_tokens.weight": np.zeros((75_000, 1000), np.float32),
        "model.layers.0.w": np.zeros((3000, 1000), np.float32),
    }
    for name in ("base", "a"):
        folder = tmp_path / name
        folder.mkdir()
        save_file({k: v + (name == "a") for k, v in big.items()}, folder / "model.safetensors")
    spec = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "a")}],
        "parameters": {"density": 0.5},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from toolkit.merge.run import merge\n"
        "merge(sys.argv[1], sys.argv[2], quiet=True, workers=2)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "spec.yaml", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 150 * 1024, f"peak resident memory {int(run.stdout) // 1024} MiB"
