"""Laws that every merge method keeps; each is run on the `EXAMPLE` that the method's own test declares."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.merge.laws import Example, reversed_params, run
from toolkit.checkpoints import deltas
from toolkit.checkpoints.reader import INDEX, open_checkpoint
from toolkit.errors import UnsupportedError
from toolkit.merge.method import METHODS, load_method
from toolkit.merge.run import merge
from toolkit.names import available

RNG = np.random.default_rng(0)
SHAPES = [(1,), (40,), (9, 1), (1, 9), (12, 7), (3, 4, 5), (1, 1), ()]
NAMES = available(METHODS)


def example(method: str) -> Example:
    return importlib.import_module(f"tests.merge.methods.test_{method}").EXAMPLE


def models(method: str, shape: tuple[int, ...] = (16, 24)) -> np.ndarray:
    return RNG.standard_normal((example(method).models, *shape)).astype(np.float32)


def close(got: np.ndarray, expected: np.ndarray, rtol: float) -> None:
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * float(np.abs(expected).max(initial=1e-30)))


@pytest.mark.parametrize("method", NAMES)
class TestLaws:
    def test_contract(self, method):
        loaded = load_method(method)
        assert loaded.takes in ("weights", "deltas", "either")
        assert loaded.scope in ("element", "row", "tensor")
        assert loaded.params.__doc__
        assert loaded.per_model.isdisjoint(loaded.shared)

    def test_slices_do_not_matter(self, method, monkeypatch):
        x = models(method, (40, 24))
        whole = run(method, x, **example(method).params)
        for chunk in (24, 100, 256):
            monkeypatch.setattr(deltas, "CHUNK", chunk)
            # Reductions are summed slice by slice, so a factor may differ in its last bit.
            close(run(method, x, **example(method).params), whole, 1e-6)

    def test_equal_models_give_that_model(self, method):
        params = example(method).neutral
        if params is None:
            assert not load_method(method).idempotent(load_method(method).params.model_construct())
            return
        x = np.repeat(models(method)[:1], example(method).models, axis=0)
        close(run(method, x, **params), x[0], example(method).rtol)

    def test_order_of_models(self, method):
        found = example(method)
        x = models(method)
        turned = reversed_params(found.params) if found.turned is None else dict(found.turned)
        got, expected = run(method, x[::-1].copy(), **turned), run(method, x, **found.params)
        if found.symmetric:
            close(got, expected, found.rtol)
        elif found.models > 1:
            assert not np.allclose(got, expected), "the example says that order matters"

    def test_scaling_all_models_scales_the_result(self, method):
        found = example(method)
        x = models(method)
        got, expected = run(method, 4 * x, **found.params), 4 * run(method, x, **found.params)
        if found.homogeneous:
            close(got, expected, found.rtol)
        else:
            assert not np.allclose(got, expected), "the example says that scale matters"

    def test_large_and_small_values_stay_finite(self, method):
        for scale in (1e-30, 1e15):
            assert np.isfinite(run(method, models(method) * scale, **example(method).params)).all()

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, method, shape):
        got = run(method, models(method, shape), **example(method).params)
        assert got.shape == shape
        assert np.isfinite(got).all()

    def test_zeros(self, method):
        got = run(method, np.zeros((example(method).models, 6, 5), np.float32), **example(method).params)
        np.testing.assert_array_equal(got, 0)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def family(request, tmp_path_factory) -> list[Path]:
    """A base and three fine-tunes of it in a dtype of 16 bits."""
    root = tmp_path_factory.mktemp("family")
    base = tiny.llama(num_hidden_layers=2).to(request.param)
    folders = [tiny.save_model(base, root / "base", max_shard_size="60KB")]
    return folders + [tiny.save_model(tiny.tuned(base, i), root / f"tuned{i}") for i in range(3)]


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def write_rows(path: Path) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"say {word}", "completion": word}) + "\n" for word in ("one", "two"))
    )
    return path


@pytest.mark.parametrize("method", NAMES)
def test_same_bytes_however_a_merge_is_run(method, family, tmp_path):
    """One worker or two, one shard or many; and the output keeps the dtype, without overflow."""
    found = example(method)
    spec = {
        "merge_method": method,
        "base_model": str(family[0]),
        "models": [{"model": str(folder)} for folder in family[1 : 1 + found.models]],
        "parameters": {},
    }
    for key, value in found.params.items():
        if key in load_method(method).per_model:
            for model, own in zip(spec["models"], value, strict=True):
                model.setdefault("parameters", {})[key] = own
        else:
            spec["parameters"][key] = value
    if load_method(method).statistics:
        spec["data"] = {"files": [str(write_rows(tmp_path / "rows.jsonl"))]}
    first = merge(spec, tmp_path / "first", quiet=True, workers=1)
    assert not first.non_finite
    assert content(first.path) == content(merge(spec, tmp_path / "again", quiet=True, workers=2).path)
    parts = merge(spec, tmp_path / "parts", quiet=True, workers=2, shard_bytes=40_000).path
    assert (parts / INDEX).is_file()
    with open_checkpoint(first.path) as a, open_checkpoint(parts) as b, open_checkpoint(family[0]) as base:
        assert set(a.tensors) == set(b.tensors)
        for name in a.tensors:
            assert a.info(name).dtype == base.info(name).dtype
            assert np.array_equal(a.read_raw(name), b.read_raw(name))


def test_unknown_method_is_answered_with_the_nearest():
    with pytest.raises(UnsupportedError, match=r"unknown merge method 'tise'; did you mean 'ties'\? \(known: "):
        load_method("tise")


@pytest.mark.parametrize("method", [name for name in NAMES if load_method(name).uses_all])
@pytest.mark.parametrize("shape", [(12, 9), (40,)], ids=str)
def test_nothing_that_is_not_finite_gets_lost_in_a_method_that_uses_all(method, shape):
    found, loaded = example(method), load_method(method)
    for index in range(found.models):
        params = dict(found.params)
        if "weight" in loaded.per_model:
            params["weight"] = tuple(float(i != index) for i in range(found.models))
        for bad in (np.nan, np.inf, -np.inf):
            x = models(method, shape)
            x[index].reshape(-1)[7] = bad
            with np.errstate(invalid="ignore"):
                assert not np.isfinite(run(method, x, **params)).all(), (index, bad)
