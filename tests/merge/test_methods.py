"""Every merge method against a closed form in float64, PEFT where it is right, and laws that all must keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties

from toolkit.errors import UnsupportedError
from toolkit.merge.method import METHODS, load_method
from toolkit.merge.ops import _cut_by_histogram, largest
from toolkit.names import available

RNG = np.random.default_rng(0)


class Arrays:
    """A tensor of several models in memory, cut into chunks of a given size; the arrays it yields are its own."""

    def __init__(self, x: np.ndarray, chunk: int) -> None:
        self.x, self.chunk = x.astype(np.float32), chunk
        self.num_models, self.count = x.shape

    def of_model(self, index: int, every: int = 1):
        for start in range(0, self.count, self.chunk * every):
            yield start, self.x[index, start : start + self.chunk].copy()

    def stacked(self):
        for start in range(0, self.count, self.chunk):
            yield start, self.x[:, start : start + self.chunk].copy()


def run(method: str, x: np.ndarray, chunk: int = 65536, **params: Any) -> np.ndarray:
    """Merge the rows of `x`, as weights or as deltas, whichever the method takes."""
    loaded = load_method(method)
    settings = loaded.params.model_validate(params)
    tensor = Arrays(x, chunk)
    state = loaded.prepare(tensor, settings) if loaded.prepare else None
    return np.concatenate([loaded.combine(c, settings, state, start).copy() for start, c in tensor.stacked()])


def params_of(method: str, models: int) -> dict[str, Any]:
    weights = tuple([0.5, 0.3, 0.2][:models])
    return {
        "linear": {"weight": weights},
        "task_arithmetic": {"weight": weights, "lambda": 0.7},
        "ties": {"weight": weights, "density": (0.4,) * models},
        "slerp": {"t": 0.3},
    }[method]


def expected_ties(
    x: np.ndarray, weights: list[float], density: list[float], scale: float, normalize: bool
) -> np.ndarray:
    """TIES in float64, one element at a time."""
    x = x.astype(np.float64)
    kept = np.zeros_like(x)
    for i, row in enumerate(x):
        keep = max(1, int(density[i] * len(row)))
        order = sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))[:keep]
        kept[i, order] = row[order]
    out = np.zeros(x.shape[1])
    for j in range(x.shape[1]):
        column = [w * v for w, v in zip(weights, kept[:, j], strict=True)]
        sign = 1 if sum(column) >= 0 else -1
        agree = [(w, v) for w, v in zip(weights, column, strict=True) if v * sign > 0]
        total = sum(v for _, v in agree)
        divisor = sum(w for w, _ in agree)
        out[j] = scale * (total / divisor if normalize and divisor else total)
    return out


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(normalize):
    x = RNG.standard_normal((3, 500))
    w = np.array([0.5, 0.3, 0.7])
    expected = (w[:, None] * x).sum(0) / (w.sum() if normalize else 1)
    np.testing.assert_allclose(run("linear", x, weight=tuple(w), normalize=normalize), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(normalize):
    x = RNG.standard_normal((3, 500))
    w = np.array([0.5, -0.3, 0.7])
    expected = 0.8 * (w[:, None] * x).sum(0) / (w.sum() if normalize else 1)
    got = run("task_arithmetic", x, weight=tuple(w), normalize=normalize, **{"lambda": 0.8})
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("case", ["random", "parallel", "antipodal", "zero", "orthogonal"])
def test_slerp(case, t):
    a = RNG.standard_normal(900)
    b = {
        "random": RNG.standard_normal(900) * 2,
        "parallel": a * 1.5,
        "antipodal": -a,
        "zero": np.zeros(900),
        "orthogonal": np.concatenate([a[450:], -a[:450]]),
    }[case]
    cosine = a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30) if b.any() else 1.0
    if abs(cosine) > 0.9995:
        expected = (1 - t) * a + t * b
    else:
        angle = np.arccos(cosine)
        expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    got = run("slerp", np.stack([a, b]), chunk=100, t=t)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.2), (1.0, 0.5, -1.0)])
def test_ties(weights, normalize):
    x = RNG.standard_normal((3, 400))
    density = (0.2, 0.5, 1.0)
    got = run("ties", x, chunk=64, weight=weights, density=density, normalize=normalize, **{"lambda": 0.9})
    expected = expected_ties(x.astype(np.float32), list(weights), list(density), 0.9, normalize)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_ties_equals_peft_at_equal_weights():
    # At other weights PEFT elects the sign before weighting and divides by a count, which is another algorithm.
    x = RNG.standard_normal((3, 10000)).astype(np.float32)
    expected = peft_ties([torch.from_numpy(row) for row in x], torch.ones(3), 0.2)
    got = run("ties", x, weight=(1.0,) * 3, density=(0.2,) * 3)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_ties_on_values_that_are_mostly_equal():
    # Deltas of bfloat16 models lie on a grid: many magnitudes are equal, and many are zero.
    x = RNG.integers(-2, 3, (3, 5000)).astype(np.float32) / 4
    for density in (0.001, 0.1, 0.5, 0.9):
        got = run("ties", x, chunk=512, weight=(1.0, 0.7, 0.4), density=(density,) * 3)
        np.testing.assert_allclose(
            got, expected_ties(x, [1.0, 0.7, 0.4], [density] * 3, 1.0, True), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["normal", "grid", "constant", "heavy tails", "one outlier"])
@pytest.mark.parametrize("count", [1, 2, 63, 1000, 200_000])
def test_cut_keeps_exactly_the_largest(kind, count):
    x = {
        "normal": lambda: RNG.standard_normal(count),
        "grid": lambda: RNG.integers(-8, 9, count) / 8,
        "constant": lambda: np.full(count, 0.25),
        "heavy tails": lambda: RNG.standard_cauchy(count),
        "one outlier": lambda: np.where(np.arange(count) == count // 2, 1e30, 1e-30),
    }[kind]()
    tensor = Arrays(x[None], chunk=4096)
    for keep in sorted({1, count // 10, count // 2, count - 1, count} - {0}):
        order = np.lexsort((np.arange(count), -np.abs(tensor.x[0])))
        expected = np.zeros(count, bool)
        expected[order[:keep]] = True
        for cut in (largest(tensor, 0, keep), _cut_by_histogram(tensor, 0, keep)):
            bits = np.abs(tensor.x[0]).view(np.uint32)
            kept = (bits > cut.threshold) | ((bits == cut.threshold) & (np.arange(count) <= cut.last))
            np.testing.assert_array_equal(kept, expected)
            for start, chunk in tensor.of_model(0):
                here = kept[start : start + len(chunk)]
                whole = chunk.copy()
                cut.drop(chunk, start)
                np.testing.assert_array_equal(chunk, np.where(here, whole, 0))


METHOD_NAMES = available(METHODS)


@pytest.mark.parametrize("method", METHOD_NAMES)
class TestLaws:
    def models(self, method: str, count: int = 700) -> np.ndarray:
        return RNG.standard_normal((load_method(method).models[1] or 3, count)).astype(np.float32)

    def test_contract(self, method):
        loaded = load_method(method)
        assert loaded.takes in ("weights", "deltas")
        assert loaded.params.__doc__
        assert loaded.per_model().isdisjoint(loaded.shared())

    def test_chunks_do_not_matter(self, method):
        x = self.models(method)
        params = params_of(method, len(x))
        whole = run(method, x, **params)
        for chunk in (1, 7, 256):
            # Reductions are summed chunk by chunk in float64, so they may differ in the last bit of a factor.
            np.testing.assert_allclose(run(method, x, chunk=chunk, **params), whole, rtol=1e-6, atol=1e-7)

    def test_equal_models_give_that_model(self, method):
        loaded = load_method(method)
        x = np.repeat(self.models(method)[:1], loaded.models[1] or 3, axis=0)
        params = params_of(method, len(x))
        if loaded.takes == "deltas":
            params |= {"weight": (1 / 3,) * 3, "lambda": 1.0} | ({"density": (1.0,) * 3} if "density" in params else {})
        np.testing.assert_allclose(run(method, x, **params), x[0], rtol=1e-5, atol=1e-6)

    def test_order_of_models_does_not_matter(self, method):
        x = self.models(method)
        params = params_of(method, len(x))
        turned = {k: v[::-1] if isinstance(v, tuple) else v for k, v in params.items()}
        if method == "slerp":
            turned["t"] = 1 - params["t"]
        np.testing.assert_allclose(
            run(method, x[::-1].copy(), **turned), run(method, x, **params), rtol=1e-5, atol=1e-6
        )

    def test_scaling_all_models_scales_the_result(self, method):
        x = self.models(method)
        params = params_of(method, len(x))
        np.testing.assert_allclose(run(method, 4 * x, **params), 4 * run(method, x, **params), rtol=1e-5, atol=1e-6)

    def test_large_values_stay_finite(self, method):
        x = self.models(method) * 1e30
        assert np.isfinite(run(method, x, **params_of(method, len(x)))).all()

    def test_one_element(self, method):
        x = self.models(method, 1)
        assert run(method, x, **params_of(method, len(x))).shape == (1,)


def test_unknown_method_is_answered_with_the_nearest():
    with pytest.raises(UnsupportedError, match=r"unknown merge method 'tise'; did you mean 'ties'\? \(known: linear, "):
        load_method("tise")
