"""`della_linear` against masks recomputed by brute force, against statistics over seeds, and against mergekit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.merge.laws import WEIGHTS, Example, run, settings
from toolkit.merge.methods import _remembered
from toolkit.merge.random import Draws

RNG = np.random.default_rng(0)
DENSITY, EPSILON = (0.3, 0.5, 0.8), (0.2, 0.5, 0.1)
EXAMPLE = Example(
    {"weight": WEIGHTS, "density": DENSITY, "epsilon": EPSILON},
    neutral={"weight": (1 / 3,) * 3, "density": (1.0,) * 3},
    symmetric=False,
)


def probabilities(rows: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """Return the probability of each element of `[R, K]` to be kept, one at a time; equal ones share their mean."""
    out = np.full(rows.shape, density)
    width = rows.shape[1]
    for i, row in enumerate(np.abs(rows)):
        for j, value in enumerate(row):
            rank = np.count_nonzero(row < value) + (np.count_nonzero(row == value) - 1) / 2
            if width > 1:
                out[i, j] = density - epsilon + 2 * epsilon * rank / (width - 1)
    return out


def masks(x: np.ndarray, density: tuple[float, ...], epsilon: tuple[float, ...], seed: int = 0) -> np.ndarray:
    """Recompute which elements each model keeps of `[M, R, K]`, where no two magnitudes of a row are equal."""
    found = []
    for i, rows in enumerate(x):
        number = Draws(seed, "layer.weight", i).bits(0, rows.size).astype(np.float64) / 2**32
        found.append(number.reshape(rows.shape) < probabilities(rows, density[i], epsilon[i]))
    return np.stack(found)


def dropped(x: np.ndarray, density: tuple[float, ...], epsilon: tuple[float, ...], rescale_by: str) -> np.ndarray:
    """Drop and rescale `[M, R, K]` in float64."""
    wide = x.astype(np.float64)
    kept = np.where(masks(x, density, epsilon), wide, 0)
    if rescale_by == "norm":
        return kept * (np.abs(wide).sum(axis=(1, 2)) / np.abs(kept).sum(axis=(1, 2)))[:, None, None]
    chance = np.stack([probabilities(*parts) for parts in zip(x, density, epsilon, strict=True)])
    return np.divide(kept, chance, out=kept, where=kept != 0)


def feed_masks(monkeypatch: pytest.MonkeyPatch, wanted: np.ndarray) -> list[np.ndarray]:
    """Let torch draw these masks `[M, R, K]`, one model after another; returns the probabilities it is asked for."""
    rows, asked = iter(torch.from_numpy(wanted)), []

    def bernoulli(chances: torch.Tensor) -> torch.Tensor:
        asked.append(chances.numpy())
        return next(rows).to(chances.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return asked


@pytest.mark.parametrize("rescale_by", ["norm", "probability"])
@pytest.mark.parametrize("shape", [(30, 41), (3, 200), (50, 2)])
def test_closed_form(rescale_by, shape):
    x = RNG.standard_normal((3, *shape)).astype(np.float32)
    weights = np.array([0.5, -0.3, 0.7])
    expected = 0.8 * np.einsum("m,mij->ij", weights, dropped(x, DENSITY, EPSILON, rescale_by))
    own = {"weight": tuple(weights), "density": DENSITY, "epsilon": EPSILON}
    got = run("della_linear", x, **own, rescale_by=rescale_by, **{"lambda": 0.8})
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 0.1])
def test_a_narrow_window_is_dare(epsilon):
    x = RNG.standard_normal((1, 40, 50)).astype(np.float32)
    got = run("della_linear", x, density=(0.4,), epsilon=(epsilon,), rescale=False)
    expected = run("dare_linear", x, density=(0.4,), rescale=False)
    assert np.array_equal(got, expected) == (epsilon < 0.1)


@pytest.mark.parametrize("shape", [(40, 1), (1,), (), (1, 1), (60,), (7, 5), (3, 4, 5)], ids=str)
def test_share_kept(shape):
    """Over seeds each element is kept as often as its rank says; mergekit fails on rows and tensors of one element."""
    x = RNG.standard_normal((1, *shape)).astype(np.float32)
    rows = x.reshape(-1, shape[-1] if shape else 1)
    seeds = 3000
    kept = sum(run("della_linear", x, density=(0.4,), epsilon=(0.3,), rescale=False, seed=s) != 0 for s in range(seeds))
    chance = probabilities(rows, 0.4, 0.3).reshape(shape)
    assert (np.abs(kept / seeds - chance) < 5 * np.sqrt(chance * (1 - chance) / seeds)).all()


def test_equal_magnitudes_share_the_mean_of_their_ranks():
    # On the grid of bfloat16 most magnitudes of a row are equal to others; mergekit's ranks split them by chance.
    x = RNG.choice([-1.0, 1.0, 1.0, 0.5, 2.0], (1, 6, 20)).astype(np.float32)
    chance = probabilities(x[0], 0.5, 0.4)
    seeds = 4000
    params = {"preset": "paper", "density": (0.5,), "epsilon": (0.4,)}
    drawn = np.stack([run("della_linear", x, **params, seed=s) for s in range(seeds)])
    kept = (drawn != 0).mean(axis=0)
    assert (np.abs(kept - chance) < 5 * np.sqrt(chance * (1 - chance) / seeds)).all()
    # And the paper's rescaling makes the mean that of the delta.
    spread = np.abs(x[0]) * np.sqrt((1 - chance) / chance / seeds)
    assert (np.abs(drawn.mean(axis=0) - x[0]) < 5 * spread).all()


def test_an_element_without_a_chance_is_never_kept():
    x = np.arange(1.0, 101).reshape(1, 10, 10)
    for seed in range(200):
        kept = run("della_linear", x, density=(0.5,), epsilon=(0.5,), rescale=False, seed=seed) != 0
        assert kept[:, -1].all()
        assert not kept[:, 0].any()


@pytest.mark.parametrize("shape", [(300, 500), (70_000,), (70_000, 1)], ids=str)
def test_remembered_masks_are_the_same(monkeypatch, shape):
    x = RNG.standard_normal((2, *shape)).astype(np.float32)
    params = {"density": (0.3, 0.6), "epsilon": (0.1, 0.2)}
    remembered = run("della_linear", x, **params)
    monkeypatch.setattr(_remembered, "MOST", 0)
    np.testing.assert_array_equal(run("della_linear", x, **params), remembered)


def test_mergekit_preset_keeps_the_norm():
    x = (RNG.standard_normal((1, 80, 1000)) * 100).astype(np.float16).astype(np.float32)
    got = run("della_linear", x, density=(0.2,), epsilon=(0.1,))
    assert np.abs(got.astype(np.float64)).sum() == pytest.approx(np.abs(x.astype(np.float64)).sum(), rel=1e-6)


def test_mergekit_on_the_same_masks(monkeypatch):
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((3, 50, 40)).astype(np.float32)
    epsilon = (0.2, 0.4, 0.1)  # mergekit refuses probabilities of exactly 0 and 1
    asked = feed_masks(monkeypatch, masks(x, DENSITY, epsilon))
    tensors = [torch.zeros(50, 40), *map(torch.from_numpy, x)]
    own = {"weight": list(WEIGHTS), "density": list(DENSITY), "epsilon": list(epsilon)}
    expected = merge_tensors(tensors, "della_linear", parameters=own | {"lambda": 0.7}, base_index=0)
    for rows, chances, density, width in zip(x, asked, DENSITY, epsilon, strict=True):
        np.testing.assert_allclose(chances, probabilities(rows, density, width), rtol=1e-5)
    got = run("della_linear", x, weight=WEIGHTS, density=DENSITY, epsilon=epsilon, **{"lambda": 0.7})
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_probabilities_must_be_probabilities():
    with pytest.raises(ValidationError, match=r"density 0\.1 plus or minus epsilon 0\.15 is not within 0 and 1"):
        settings("della_linear", {"density": (0.1,)}, 2)
    settings("della_linear", {"density": (1.0,)}, 2)
