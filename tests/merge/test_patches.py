"""Signatures as files: their formula in float64, half a step of error, and patches that leave no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.merge.learned.problems import weights
from toolkit.checkpoints.compressed import open_compressed
from toolkit.checkpoints.layout import layer_of, role_of
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.merge.patches import patched, write_signatures
from toolkit.merge.run import merge


@pytest.fixture(scope="module")
def models(base, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        n: tiny.save_model(tiny.tuned(tiny.llama(), i), folder / n) for i, n in enumerate(("clean", "blur", "noise"))
    }
    return {"base": base, **made}


def exact(models: dict[str, Path], name: str) -> dict[str, np.ndarray]:
    start, clean, corrupt = (
        {n: v.double().numpy() for n, v in weights(models[m]).items()} for m in ("base", "clean", name)
    )
    found = {}
    for tensor, value in start.items():
        delta, along = corrupt[tensor] - value, clean[tensor] - value
        found[tensor] = delta - (delta * along).sum() / (along * along).sum() * along
    return found


def stored(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Read a patch without the toolkit's reader of deltas: levels times the scale of their row."""
    with open_compressed(f"{folder}#{name}").store as store:
        values = {n: store.tensor(n).double().numpy() for n in store.tensors}
    found = {}
    for key, levels in values.items():
        tensor, part, task = key.split(":")
        if part == "levels" and task == name:
            scale = values[f"{tensor}:scale:{name}"]
            found[tensor] = levels * (scale[:, None] if levels.ndim > 1 else scale)
    return found


def write(models: dict[str, Path], out: Path, **options: object):
    corrupt = {name: models[name] for name in ("blur", "noise")}
    return write_signatures(models["base"], models["clean"], corrupt, out, quiet=True, **options)


@pytest.mark.system("rws")
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_no_entry_is_off_by_more_than_half_a_step(bits, models, tmp_path):
    result = write(models, tmp_path / "out", bits=bits)
    for name in ("blur", "noise"):
        wanted, found = exact(models, name), stored(tmp_path / "out", name)
        assert found.keys() == wanted.keys()
        square = error = 0.0
        for tensor, value in wanted.items():
            step = np.abs(value).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
            assert np.all(np.abs(found[tensor] - value) <= step / 2 + 2e-6)
            square, error = square + (value**2).sum(), error + ((found[tensor] - value) ** 2).sum()
        assert result.errors[name] == pytest.approx(np.sqrt(error / square), rel=1e-3)
    assert result.errors["blur"] > 0.3 if bits == 2 else result.errors["blur"] < 0.2


@pytest.mark.system("rws")
def test_first_layers_alone_are_much_smaller(models, tmp_path):
    write(models, tmp_path / "all")
    few = write(models, tmp_path / "few", keep_layers=1)
    names = stored(tmp_path / "few", "blur")
    assert all(layer_of(n) == ("model.layers", 0) or role_of(n) == "embedding" for n in names)
    assert len(names) == 10
    assert few.numbers["bytes_of_models"] / few.numbers["bytes"] > 6
    with pytest.raises(UnsupportedError, match="nothing is left of the signatures"):
        write(models, tmp_path / "none", keep_layers=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.system("rws")
def test_a_patch_is_a_model_of_any_merge(models, tmp_path):
    """Added to another fine-tune and scaled; several at once; in either order."""
    write(models, tmp_path / "out")
    patches = {name: stored(tmp_path / "out", name) for name in ("blur", "noise")}
    target = {n: v.double().numpy() for n, v in weights(models["noise"]).items()}
    for index, order in enumerate((("blur", "noise"), ("noise", "blur"))):
        scales = {"blur": 0.5, "noise": -0.3}
        given = [{"model": f"{tmp_path / 'out'}#{n}", "parameters": {"weight": scales[n]}} for n in order]
        spec = {"merge_method": "task_arithmetic", "base_model": str(models["noise"]), "models": given}
        merge(spec, tmp_path / str(index), quiet=True)
        for tensor, value in weights(tmp_path / str(index)).items():
            wanted = target[tensor] + 0.5 * patches["blur"][tensor] - 0.3 * patches["noise"][tensor]
            np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.system("rws")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taken_out_again_the_model_is_what_it_was(dtype, models, tmp_path):
    write(models, tmp_path / "out")
    model = tiny.llama().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patch = stored(tmp_path / "out", "blur")
    with patched(model, {f"{tmp_path / 'out'}#blur": 0.5}):
        for name, value in model.named_parameters():
            wanted = before[name].double() + 0.5 * torch.from_numpy(patch[name])
            torch.testing.assert_close(
                value.double(),
                wanted,
                rtol=0.01 if dtype == torch.bfloat16 else 1e-5,
                atol=1e-6 if dtype == torch.float32 else 2e-3,
            )
            assert not torch.equal(value, before[name])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="inside"), patched(model, {f"{tmp_path / 'out'}#noise": 2.0}):
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with patched(model, {f"{tmp_path / 'out'}#blur": 0.0}):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_patches_that_do_not_fit(models, tmp_path):
    with pytest.raises(UnsupportedError, match="bits is 9"):
        write(models, tmp_path / "out", bits=9)
    write(models, tmp_path / "out")
    other = tiny.llama(intermediate_size=80)
    with (
        pytest.raises(CheckpointError, match=r"but in LlamaForCausalLM it is \[48, 80\]"),
        patched(other, {f"{tmp_path / 'out'}#blur": 1.0}),
    ):
        pass
