"""Every row gets the change of its own adapter; planted faults that famous tolerances let pass are caught."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import check_stick
from toolkit.errors import UnsupportedError
from toolkit.kernels.grouped_lora import Pair, Segment, grouped_lora

K, N = 37, 53


def make(dtype=torch.float32, bias=False, dora=()):
    torch.manual_seed(0)
    pairs = {}
    for name, rank in {"a": 1, "b": 4, "c": 7, "d": 16}.items():
        gain = (1 + torch.rand(N)).to(dtype) if name in dora else None
        pairs[name] = Pair(torch.randn(rank, K).to(dtype), torch.randn(N, rank).to(dtype), gain)
    segments = [Segment(0, 3, "a"), Segment(3, 4, "b"), Segment(6, 11, "c"), Segment(11, 11, "d"), Segment(12, 13, "d")]
    x, w = torch.randn(15, K).to(dtype), torch.randn(N, K).to(dtype)
    b = torch.randn(N).to(dtype) if bias else None
    return x, w, b, segments, pairs


def exact(x, w, b, segments, pairs) -> torch.Tensor:
    """Every row on its own through a dense weight, in float64."""
    y = x.double() @ w.double().T + (0 if b is None else b.double())
    for s in segments:
        pair = pairs[s.adapter]
        for row in range(s.start, s.stop):
            tuned = w.double() + s.weight * pair.b_Nr.double() @ pair.a_rK.double()
            if pair.gain_N is not None:
                tuned = tuned * pair.gain_N.double()[:, None]
            y[row] = tuned @ x[row].double() + (0 if b is None else b.double())
    return y


def run(x, w, b, segments, pairs, impl) -> torch.Tensor:
    y = torch.nn.functional.linear(x, w, b)
    grouped_lora(y, x, segments, pairs, b, impl=impl)
    return y


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dora", [(), ("b", "c")])
def test_against_float64(impl, dtype, bias, dora):
    case = make(dtype, bias, dora)
    check_stick(run(*case, impl), exact(*case), run(*case, "reference"))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_rows_without_an_adapter_stay_bit_for_bit(impl):
    x, w, b, segments, pairs = make()
    plain = torch.nn.functional.linear(x, w, b)
    got = run(x, w, b, segments, pairs, impl)
    for row in (4, 5, 11, 13, 14):
        assert torch.equal(got[row], plain[row])
    assert torch.equal(run(x, w, b, [], pairs, impl), plain)
    assert torch.equal(run(x, w, b, [Segment(0, 15, "elsewhere")], pairs, impl), plain)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_weighted_adapters_on_the_same_rows_add_up(impl):
    x, w, b, _, pairs = make()
    segments = [Segment(0, 8, "b", 0.6), Segment(2, 5, "c", -0.4)]
    y = x.double() @ w.double().T
    y[0:8] += 0.6 * x[0:8].double() @ (pairs["b"].b_Nr.double() @ pairs["b"].a_rK.double()).T
    y[2:5] -= 0.4 * x[2:5].double() @ (pairs["c"].b_Nr.double() @ pairs["c"].a_rK.double()).T
    torch.testing.assert_close(run(x, w, b, segments, pairs, impl).double(), y, rtol=1e-4, atol=1e-4)


def test_dora_cannot_be_weighted_or_combined():
    x, w, b, _, pairs = make(dora=("b",))
    for segments in ([Segment(0, 2, "b", 0.5)], [Segment(0, 3, "b"), Segment(2, 4, "c")]):
        with pytest.raises(ValueError, match="DoRA"):
            run(x, w, b, segments, pairs, "torch")


def test_unknown_form_raises():
    with pytest.raises(UnsupportedError, match="has no form 'triton'"):
        run(*make(), "triton")


@pytest.mark.parametrize("fault", ["scale", "wrong adapter", "last column"])
def test_planted_faults_are_caught(fault):
    x, w, b, segments, pairs = make()
    bad = dict(pairs)
    if fault == "scale":
        bad["c"] = Pair(pairs["c"].a_rK, pairs["c"].b_Nr * 1.02)
    elif fault == "wrong adapter":
        bad["b"] = pairs["a"]
    else:
        clipped = pairs["c"].b_Nr.clone()
        clipped[-1] = 0
        bad["c"] = Pair(pairs["c"].a_rK, clipped)
    with pytest.raises(AssertionError):
        check_stick(
            run(x, w, b, segments, bad, "torch"),
            exact(x, w, b, segments, pairs),
            run(x, w, b, segments, pairs, "reference"),
        )
