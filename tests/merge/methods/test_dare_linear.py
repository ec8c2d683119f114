"""`dare_linear` against its closed form in float64, and against mergekit and PEFT given the same masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import WEIGHTS, Example, run
from toolkit.merge.random import Draws

RNG = np.random.default_rng(0)
DENSITY = (0.3, 0.5, 0.9)
EXAMPLE = Example(
    {"weight": WEIGHTS, "density": DENSITY},
    neutral={"weight": (1 / 3,) * 3, "density": (1.0,) * 3},
    symmetric=False,
)


def masks(shape: tuple[int, ...], density: tuple[float, ...], seed: int = 0, name: str = "layer.weight") -> np.ndarray:
    """Recompute which elements each model keeps, `[M, *shape]`."""
    count = int(np.prod(shape))
    numbers = [Draws(seed, name, i).bits(0, count).astype(np.float64) / 2**32 for i in range(len(density))]
    return np.stack([u < d for u, d in zip(numbers, density, strict=True)]).reshape(-1, *shape)


def dropped(x: np.ndarray, density: tuple[float, ...], rescale_by: str, **key) -> np.ndarray:
    """Drop and rescale in float64."""
    kept = np.where(masks(x.shape[1:], density, **key), x.astype(np.float64), 0)
    factors = [
        1 / d if rescale_by == "density" else np.abs(a).sum() / np.abs(b).sum()
        for a, b, d in zip(x.astype(np.float64), kept, density, strict=True)
    ]
    return kept * np.reshape(factors, (-1, *[1] * (x.ndim - 1)))


def feed_masks(monkeypatch: pytest.MonkeyPatch, wanted: np.ndarray) -> None:
    """Let torch draw these masks `[M, *shape]`, one model after another."""
    rows = iter(torch.from_numpy(wanted))

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        return next(rows).to(probabilities.dtype).reshape(probabilities.shape)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@pytest.mark.parametrize("preset", ["mergekit", "paper", "peft"])
@pytest.mark.parametrize("normalize", [True, False])
def test_closed_form(preset, normalize):
    x = RNG.standard_normal((3, 300, 500)).astype(np.float32)
    weights = np.array([0.5, -0.3, 0.7])
    parts = dropped(x, DENSITY, "norm" if preset == "mergekit" else "density", seed=5)
    expected = 0.8 * np.einsum("m,mij->ij", weights, parts) / (weights.sum() if normalize else 1)
    shared = {"preset": preset, "normalize": normalize, "seed": 5, "lambda": 0.8}
    got = run("dare_linear", x, weight=tuple(weights), density=DENSITY, **shared)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_without_rescale():
    x = RNG.standard_normal((1, 5000)).astype(np.float32)
    got = run("dare_linear", x, density=(0.3,), rescale=False)
    np.testing.assert_array_equal(got, np.where(masks((5000,), (0.3,)), x, 0)[0])


def test_masks_depend_on_seed_tensor_and_model():
    x = np.ones((2, 1000), np.float32)

    def kept(name="a", weight=(1.0, 0.0), seed=0) -> np.ndarray:
        return run("dare_linear", x, name=name, weight=weight, density=(0.5, 0.5), seed=seed) != 0

    found = [kept(), kept(name="b"), kept(weight=(0.0, 1.0)), kept(seed=1)]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert 400 < np.count_nonzero(a == b) < 600


def test_mean_over_seeds_is_the_delta():
    """What the paper rescales for; and the share that is kept is the density."""
    x = RNG.standard_normal((1, 400)).astype(np.float32)
    seeds = 4000
    drawn = np.stack([run("dare_linear", x, preset="paper", density=(0.2,), seed=s) for s in range(seeds)])
    spread = np.abs(x[0]) * np.sqrt(0.8 / 0.2 / seeds)
    assert (np.abs(drawn.mean(axis=0) - x[0]) < 5 * spread).all()
    assert np.count_nonzero(drawn) / drawn.size == pytest.approx(0.2, abs=5 * np.sqrt(0.16 / drawn.size))


def test_mergekit_preset_keeps_the_norm():
    # These magnitudes sum to 6e6, which mergekit on a GPU adds up in float16, where it is infinity. It also leaves a
    # delta unscaled whose norm is below 1e-7, so its result is not proportional to the deltas.
    x = (RNG.standard_normal((1, 80, 1000)) * 100).astype(np.float16).astype(np.float32)
    got = run("dare_linear", x, density=(0.1,))
    assert np.abs(got.astype(np.float64)).sum() == pytest.approx(np.abs(x.astype(np.float64)).sum(), rel=1e-6)
    np.testing.assert_array_equal(run("dare_linear", x * np.float32(2**-60), density=(0.1,)), got * np.float32(2**-60))


def test_a_norm_that_cannot_be_kept_stays_finite():
    x = np.where(masks((1, 200), (0.5,)), 1e-40, 1e15).astype(np.float32)[:, 0]
    assert np.isfinite(run("dare_linear", x, density=(0.5,))).all()


def test_mergekit_on_the_same_masks(monkeypatch):
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((3, 50, 40)).astype(np.float32)
    shared = {"lambda": 0.7, "normalize": True}
    feed_masks(monkeypatch, masks((50, 40), DENSITY))
    tensors = [torch.zeros(50, 40), *map(torch.from_numpy, x)]
    own = {"weight": [0.5, 0.3, 0.4], "density": list(DENSITY)}
    expected = merge_tensors(tensors, "dare_linear", parameters=shared | own, base_index=0)
    got = run("dare_linear", x, weight=(0.5, 0.3, 0.4), density=DENSITY, **shared)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_peft_on_the_same_masks(monkeypatch):
    from peft.utils.merge_utils import dare_linear

    x = RNG.standard_normal((3, 2000)).astype(np.float32)
    feed_masks(monkeypatch, masks((2000,), (0.3,) * 3))
    expected = dare_linear([*map(torch.from_numpy, x)], torch.tensor(WEIGHTS), 0.3)
    got = run("dare_linear", x, preset="peft", weight=WEIGHTS, density=(0.3,) * 3)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)
