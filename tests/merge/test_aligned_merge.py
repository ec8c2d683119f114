"""`align:` in a merge: what a permutation alone keeps apart is merged as if it had not been permuted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.merge.test_align import random_permutations
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.errors import SpecError
from toolkit.merge.align.axes import symmetry_of
from toolkit.merge.align.view import PermutedCheckpoint
from toolkit.merge.plan import make_plan
from toolkit.merge.run import merge


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, str]:
    """A model, a fine-tune of it, and the fine-tune with its units permuted."""
    root = tmp_path_factory.mktemp("family")
    model = tiny.llama()
    tuned = tiny.tuned(model, 1)
    folders = {"base": tiny.save_model(model, root / "base"), "tuned": tiny.save_model(tuned, root / "tuned")}
    folders["permuted"] = tiny.save_model(tuned, root / "permuted")
    inner = open_checkpoint(folders["tuned"])
    symmetry = symmetry_of(inner)
    view = PermutedCheckpoint(inner, symmetry, random_permutations(symmetry, 5))
    save_file({name: view.tensor(name) for name in view.tensors}, folders["permuted"] / "model.safetensors")
    return {name: str(folder) for name, folder in folders.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_a_permuted_model_merges_as_the_model_itself(method, family, tmp_path):
    def spec(name: str) -> dict:
        models = [{"model": family["base"]}, {"model": family[name]}]
        parameters = {"linear": {"weight": 0.5}, "slerp": {"t": 0.3}, "ties": {"density": 0.5}}[method]
        found = {"merge_method": method, "models": models, "parameters": parameters}
        return found if method == "linear" else found | {"base_model": family["base"]}

    merge(spec("permuted") | {"align": {}}, tmp_path / "aligned", quiet=True, workers=2)
    merge(spec("tuned"), tmp_path / "expected", quiet=True)
    merge(spec("permuted"), tmp_path / "apart", quiet=True)
    expected, apart = weights(tmp_path / "expected"), weights(tmp_path / "apart")
    for name, value in weights(tmp_path / "aligned").items():
        assert torch.equal(value, expected[name]), name
    assert not torch.equal(apart["model.layers.0.mlp.up_proj.weight"], expected["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.system("weight_matching")
def test_order_of_models_that_are_aligned_to_one_reference_means_nothing(family, tmp_path):
    inner = open_checkpoint(tiny.save_model(tiny.tuned(tiny.llama(), 2), tmp_path / "other"))
    symmetry = symmetry_of(inner)
    view = PermutedCheckpoint(inner, symmetry, random_permutations(symmetry, 6))
    save_file({name: view.tensor(name) for name in view.tensors}, tmp_path / "other" / "model.safetensors")
    models = [
        {"model": model, "parameters": {"weight": 0.5}} for model in (family["permuted"], str(tmp_path / "other"))
    ]
    spec = {"merge_method": "task_arithmetic", "base_model": family["base"], "align": {}}
    merge(spec | {"models": models}, tmp_path / "one", quiet=True)
    merge(spec | {"models": models[::-1]}, tmp_path / "two", quiet=True)
    two, base = weights(tmp_path / "two"), weights(Path(family["base"]))
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=1e-6)
        assert (value - base[name]).abs().max() < 0.1, "neither is left permuted"


def test_loras_of_the_base_stay_where_they_are(base, loras):
    models = [{"model": str(base), "parameters": {"weight": 1}}, {"model": str(loras["plain"])}]
    spec = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "align": {}}
    (model,) = make_plan(spec).inputs.models
    assert model.adapter is not None


def test_what_cannot_be_aligned_is_found_before_anything_is_read(family, tmp_path):
    other = tiny.save_model(tiny.llama(intermediate_size=64), tmp_path / "other")
    models = [{"model": family["base"]}, {"model": str(other)}]
    spec = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}, "align": {}}
    with pytest.raises(SpecError, match=r"models\[1\].model: .* cannot be aligned to"):
        make_plan(spec)
    slices = [{"sources": [{"model": family["base"], "layer_range": [0, 2]}]}]
    with pytest.raises(SpecError, match="align: models are aligned as a whole"):
        make_plan({"merge_method": "passthrough", "slices": slices, "align": {"sweeps": 2}})
