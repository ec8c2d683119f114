"""Partial attention merges exactly: any split, in any order, is one softmax."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.harness import DEVICE, mutated
from toolkit.kernels.merge_states import merge_states, triton_form
from toolkit.kernels.merge_states import triton as kernels

pytestmark = [pytest.mark.usefixtures("nan_outputs"), pytest.mark.system("lean_attention")]
T, H, D, L = 5, 3, 24, 13
IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])


def state(scores, values):
    """Softmax attention of `[T, H, L]` scores in float64, and its logarithm of sums; of no keys, the identity."""
    if not scores.shape[-1]:
        return torch.zeros(T, H, D, dtype=torch.float64), torch.full((T, H), -torch.inf, dtype=torch.float64)
    return torch.einsum("thl,lhd->thd", torch.softmax(scores, -1), values), torch.logsumexp(scores, -1)


def drawn(spread=1.0):
    torch.manual_seed(0)
    return torch.randn(T, H, L, dtype=torch.float64) * spread, torch.randn(L, H, D, dtype=torch.float64)


def merged(states, impl, dtype=torch.float32):
    outs, sums = zip(*states, strict=True)
    got = merge_states(torch.stack(outs).to(DEVICE, dtype), torch.stack(sums).to(DEVICE, torch.float32), impl=impl)
    return tuple(t.double().cpu() for t in got)


SPLITS = [[13], [0, 13], [5, 0, 8], [1] * 13, [12, 1], [3, 1, 0, 9]]


@IMPLS
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_any_split_in_any_order_is_one_softmax(impl, split, spread):
    scores, values = drawn(spread)
    states = [state(s, v) for s, v in zip(scores.split(split, -1), values.split(split), strict=True)]
    expected = state(scores, values)
    for order in (states, states[::-1], states[1:] + states[:1]):
        # Logarithms of sums of 10,000 are float32 numbers that are 0.001 apart.
        torch.testing.assert_close(merged(order, impl), expected, rtol=1e-6, atol=2e-6 * max(1, spread / 10))


def test_the_reference_is_exact_and_associative():
    scores, values = drawn()
    parts = [state(s, v) for s, v in zip(scores.split([4, 1, 8], -1), values.split([4, 1, 8]), strict=True)]

    def both(a, b):
        return merge_states(torch.stack([a[0], b[0]]), torch.stack([a[1], b[1]]), impl="reference")

    left, right = both(both(parts[0], parts[1]), parts[2]), both(parts[0], both(parts[1], parts[2]))
    torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(left, state(scores, values), rtol=1e-14, atol=1e-15)


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_identity_changes_nothing(impl, dtype):
    scores, values = drawn()
    out, lse = (t.float() for t in state(scores, values))
    none = torch.zeros(T, H, D), torch.full((T, H), -torch.inf)
    got = merged([none, (out.to(dtype), lse), none], impl, dtype)
    assert torch.equal(got[0], out.to(dtype).double())
    torch.testing.assert_close(got[1], lse.double(), rtol=1e-6, atol=1e-7)
    nothing = merged([none, none], impl, dtype)
    assert torch.equal(nothing[0], none[0].double())
    assert torch.equal(nothing[1], none[1].double())


@pytest.mark.parametrize(
    ("fault", "before", "after"),
    [
        ("scale off by 2%", "share * tl.load(part_ptr", "1.02 * share * tl.load(part_ptr"),
        ("a part of another head", "+ head % GROUP", "+ (head + 1) % GROUP"),
        ("last column dropped", "mask=ds < SIZE, other=0)", "mask=ds < SIZE - 1, other=0)"),
    ],
)
def test_planted_faults_are_caught(fault, before, after, monkeypatch):
    scores, values = drawn()
    states = [state(s, v) for s, v in zip(scores.split([5, 8], -1), values.split([5, 8]), strict=True)]
    monkeypatch.setattr(triton_form.kernels, "_merge", mutated(kernels._merge, lambda s: _changed(s, before, after)))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(merged(states, "triton"), state(scores, values), rtol=1e-6, atol=2e-6)


def _changed(source, before, after):
    assert before in source
    return source.replace(before, after)


def test_states_of_different_queries_are_refused():
    with pytest.raises(ValueError, match="different queries"):
        merge_states(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 5))
