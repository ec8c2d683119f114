"""Merging in one pass: the same bits as numpy's steps one by one, which are what merges on a CPU are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.harness import (
    DEVICE,
    INTERPRETED,
    check_resources,
    compile_in_process,
    count_traffic,
    mutated,
)
from toolkit.kernels.launch import GENERATIONS, record
from toolkit.kernels.merge_elementwise import KeptAtRandom, KeptLargest, Vote, merge_elementwise, triton_form
from toolkit.kernels.merge_elementwise import triton as kernels
from toolkit.kernels.merge_elementwise.api import BLOCK
from toolkit.merge.device.fused import keys_of
from toolkit.merge.methods._dare import RandomMask
from toolkit.merge.ops import agree_on_signs, weighted_sum
from toolkit.merge.random import Draws
from toolkit.merge.selection import Cut, largest

pytestmark = [pytest.mark.usefixtures("nan_outputs")]
IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])
WEIGHTS = [[0.3, 0.3, 0.3], [0.1, 0.7, -0.4], [0.7, 0.1, 0.7], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [-0.5] * 3]
VOTES = [Vote(by, zero, divisor) for by in ("weighted", "total", "frequency") for zero in (1.0, -1.0)
         for divisor in ("weights", "count", "none")]  # fmt: skip


def deltas(count: int, seed: int = 0, models: int = 3) -> np.ndarray:
    """Return numbers of which many are equal, or equal but for their sign, as deltas of bfloat16 models are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((models, count)).astype(np.float32)
    x[:, ::3] = np.round(x[:, ::3] * 4) / 4
    x[:, 5::7] = 0
    x[1, 5::14] = -0.0
    x[0, 1::11] = -x[1, 1::11]
    return x


def fused(x: np.ndarray, weights, impl="triton", **options) -> np.ndarray:
    return merge_elementwise(torch.from_numpy(x).to(DEVICE), weights, impl=impl, **options).cpu().numpy()


def stepwise(x, weights, *, vote=None, drop=None, scale=1.0, base=None) -> np.ndarray:
    """Merge with the functions of merge methods, in numpy."""
    x = x.copy()
    for i, row in enumerate(x):
        if drop:
            drop(i, row)
    with np.errstate(all="ignore"):
        if vote is None:
            merged = weighted_sum(x, weights)
        else:
            merged = agree_on_signs(x, weights, vote=vote.by, zero=vote.zero, divisor=vote.divisor)
        merged = np.multiply(merged, np.float32(scale))
        return merged if base is None else np.add(merged, base)


@IMPLS
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weighted_sums_have_numpys_bits(impl, weights):
    x, base = deltas(2500), deltas(2500, 1)[0]
    np.testing.assert_array_equal(fused(x, weights, impl), stepwise(x, weights))
    got = fused(x, weights, impl, scale=0.7, base_N=torch.from_numpy(base).to(DEVICE))
    np.testing.assert_array_equal(got, stepwise(x, weights, scale=0.7, base=base))


@IMPLS
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_signs_are_elected_with_numpys_bits(impl, weights):
    x, base = deltas(1500), deltas(1500, 1)[0]
    for vote in VOTES:
        got = fused(x, weights, impl, vote=vote, scale=0.7, base_N=torch.from_numpy(base).to(DEVICE))
        np.testing.assert_array_equal(got, stepwise(x, weights, vote=vote, scale=0.7, base=base), str(vote))


@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from(VOTES), st.data())
@settings(max_examples=25)
def test_any_number_of_models(models, seed, vote, data):
    x = deltas(70, seed, models) if models > 1 else deltas(70, seed, 2)[:1]
    weights = data.draw(st.lists(st.sampled_from([0.25, 0.3, -0.3, 1.0, 0.0]), min_size=models, max_size=models))
    np.testing.assert_array_equal(fused(x, weights, vote=vote), stepwise(x, weights, vote=vote))


@IMPLS
@pytest.mark.parametrize("vote", [None, Vote()], ids=["sum", "vote"])
def test_the_largest_of_each_model(impl, vote):
    """TIES: exact numbers of elements, of which the last ones are equal to others that are dropped."""
    x = deltas(3000)
    cuts = [cut for (cut,) in largest(lambda every=1, begin=0: iter([(0, x)]), 3000, [[700], [1], [3000]])]
    kept = KeptLargest([cut.threshold for cut in cuts], [cut.last for cut in cuts])
    expected = stepwise(x, [0.5, 0.2, 0.9], vote=vote, drop=lambda i, row: cuts[i].drop(row, 0))
    np.testing.assert_array_equal(fused(x, [0.5, 0.2, 0.9], impl, kept=kept, vote=vote), expected)
    for start, stop in ((0, 1700), (1700, 3000)):
        part = fused(x[:, start:stop].copy(), [0.5, 0.2, 0.9], impl, kept=kept, vote=vote, start=start)
        np.testing.assert_array_equal(part, expected[start:stop])
    # Every other number at the threshold: the first ones are kept.
    grid = np.tile(np.float32([0.5, -0.5, 0.25]), 40)[None]
    cut = Cut(int(np.float32(0.5).view(np.uint32)), 60)
    got = fused(grid, [1.0], impl, kept=KeptLargest([cut.threshold], [cut.last]))
    assert np.flatnonzero(got).tolist() == [i for i in range(61) if i % 3 < 2]
    nothing = fused(grid, [1.0], impl, kept=KeptLargest([1 << 31], [-1]))
    assert not nothing.any()


STARTS = [(0, 3000), (BLOCK - 100, 300), (2 * BLOCK, 1024), (5 * BLOCK + 77, BLOCK + 50), (3, 1)]


@IMPLS
@pytest.mark.parametrize(("start", "count"), STARTS)
def test_random_masks_are_numpys_bit_for_bit(impl, start, count):
    """DARE: ones instead of deltas show the masks themselves."""
    draws, probabilities = [Draws(7, "a.weight", i) for i in range(3)], (0.3, 0.9, 1.0)
    kept = random_of(draws, probabilities, start, count)
    for model, probability in enumerate(probabilities):
        only = [float(model == i) for i in range(3)]
        got = fused(np.ones((3, count), np.float32), only, impl, kept=kept, start=start)
        np.testing.assert_array_equal(got != 0, draws[model].below(probability, start, start + count))
    if count > 1000:
        x = deltas(count)
        masks = [RandomMask(d, p, 1 / p) for d, p in zip(draws, probabilities, strict=True)]
        for vote in (None, Vote("total", 1.0, "count")):
            got = fused(x, [0.5, 0.2, 0.9], impl, kept=kept, vote=vote, start=start)
            expected = stepwise(x, [0.5, 0.2, 0.9], vote=vote, drop=lambda i, r: masks[i].drop_and_rescale(r, start))
            np.testing.assert_array_equal(got, expected)


def random_of(draws, probabilities, start, count):
    keys = torch.from_numpy(keys_of(draws, start, start + count)).to(DEVICE)
    return KeptAtRandom(keys, [round(p * 2**32) for p in probabilities], [1 / p for p in probabilities])


@IMPLS
def test_what_is_not_finite_stays_where_it_is(impl):
    x = deltas(300)
    x[0, 3], x[1, 7], x[2, 9] = np.nan, np.inf, -np.inf
    for vote in (None, Vote(), Vote("frequency", -1.0, "count")):
        got, expected = fused(x, [0.5, 0.2, 0.9], impl, vote=vote), stepwise(x, [0.5, 0.2, 0.9], vote=vote)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        np.testing.assert_array_equal(got[np.isfinite(expected)], expected[np.isfinite(expected)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_types_are_widened(dtype):
    x = torch.randn(3, 77).to(DEVICE, dtype)
    got = merge_elementwise(x, [0.5, 0.2, 0.9], vote=Vote(), base_N=x[1], impl="triton").cpu()
    wide = x.float().cpu().numpy()
    np.testing.assert_array_equal(got, stepwise(wide, [0.5, 0.2, 0.9], vote=Vote(), base=wide[1]))


def test_the_reference_in_float64():
    x = torch.from_numpy(deltas(200)).double()
    got = merge_elementwise(x, [0.5, 0.2, 0.9], vote=Vote(), impl="reference")
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, stepwise(x.float().numpy(), [0.5, 0.2, 0.9], vote=Vote()), rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not INTERPRETED, reason="takes memory that is not there on a GPU")
def test_models_that_lie_far_apart():
    """Memory that is never touched costs nothing."""
    x = deltas(100)
    memory = torch.empty_strided((3 * 2**30,), (1,), dtype=torch.float32)
    far = memory.as_strided((3, 100), (2**30 + 3, 1), 5)
    far.copy_(torch.from_numpy(x))
    got = merge_elementwise(far, [0.5, 0.2, 0.9], vote=Vote(), start=2**33 + 5, impl="triton")
    np.testing.assert_array_equal(got, stepwise(x, [0.5, 0.2, 0.9], vote=Vote()))


def test_nothing_to_do():
    with record() as launches:
        assert not len(merge_elementwise(torch.zeros(3, 0, device=DEVICE), [1.0] * 3, impl="triton"))
    assert not launches


@pytest.mark.skipif(not INTERPRETED, reason="loads are counted in the interpreter")
@pytest.mark.parametrize("vote", [None, Vote()], ids=["sum", "vote"])
def test_each_element_is_loaded_once_from_memory(vote):
    x, base = torch.from_numpy(deltas(5000)), torch.zeros(5000)
    with count_traffic(x, base) as (read, added):
        merge_elementwise(x, [0.5, 0.2, 0.9], vote=vote, base_N=base, impl="triton")
    assert read.touched.all()
    assert added.loaded == base.nbytes
    # With a vote a tile is gone through three times in a row, two of them from the multiprocessor's own cache.
    assert read.loaded == x.nbytes * (1 if vote is None else 3)


FAULTS = {
    "scale off by 2%": ("total *= scale", "total *= 1.02 * scale"),
    "last elements dropped": ("(at < count)", "(at < count - 1)"),
    "the sign of a tie": ("votes == 0, zero_flip", "votes == 0, 0"),
    "a model with the random numbers of another": ("(model * blocks + block)", "((model ^ 1) * blocks + block)"),
    "a hash with another shift": ("word >> 15", "word >> 14"),
    "one element too few at the threshold": ("(at < equal)", "(at < equal - 1)"),
}


@pytest.mark.parametrize(("before", "after"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(before, after, monkeypatch):
    x, vote = deltas(2500)[:2].copy(), Vote("frequency", -1.0, "count")
    draws = [Draws(7, "a.weight", i) for i in range(2)]
    cuts = [cut for (cut,) in largest(lambda every=1, begin=0: iter([(0, x)]), 2500, [[700], [900]])]
    kept = KeptLargest([cut.threshold for cut in cuts], [cut.last for cut in cuts])
    masks = [RandomMask(d, 0.5, 2.0) for d in draws]

    def check():
        for given_, drop in (
            (kept, lambda i, row: cuts[i].drop(row, 0)),
            (random_of(draws, (0.5, 0.5), 0, 2500), lambda i, row: masks[i].drop_and_rescale(row, 0)),
        ):
            got = fused(x, [0.5, 0.2], kept=given_, vote=vote)
            np.testing.assert_array_equal(got, stepwise(x, [0.5, 0.2], vote=vote, drop=drop))

    def change(source):
        assert before in source
        return source.replace(before, after)

    check()
    monkeypatch.setattr(kernels, "_merge_elements", mutated(kernels._merge_elements, change))
    with pytest.raises(AssertionError):
        check()


def test_what_does_not_fit_is_refused():
    x = torch.zeros(3, 8, device=DEVICE)
    keys = torch.zeros(3, 1, 2, dtype=torch.int32, device=DEVICE)
    for options, message in (
        ({"weights": [1.0]}, "1 numbers for 3 models"),
        ({"kept": KeptLargest([1, 1, 1], [1])}, "3, 3, 1 numbers for 3 models"),
        ({"kept": KeptAtRandom(keys, [1] * 3, [1.0] * 3), "start": BLOCK - 2}, "and 2 blocks"),
        ({"base_N": torch.zeros(7, device=DEVICE)}, "a base"),
        ({"x_MN": torch.zeros(8, 3, device=DEVICE).T}, "next to each other"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_elementwise(**{"x_MN": x, "weights": [1.0] * 3, **options})


@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles_without_fusing_products_and_sums(generation):
    found = compile_in_process(["merge_weights"], generation, whole_table=True)
    check_resources(found, GENERATIONS[generation].shared_memory)
    assert len(found) == 4
    assert {kernel["kernel"] for kernel in found} == set(triton_form.TABLE.kernels(generation))
    # A division is made of such instructions, but rounded right; sums of products must not be.
    assert {kernel["fused"] for kernel in found if not kernel["constants"]["DIVISOR"]} == {0}
    assert {kernel["narrow"] for kernel in found if kernel["dtype"] == "float32"} == {0}
