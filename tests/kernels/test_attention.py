"""Paged attention against a dense softmax in float64, with pages that are shuffled and unused ones poisoned."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.oracles import check_stick
from toolkit.kernels.decode_attention import decode_attention
from toolkit.kernels.paging import gather, store, visible
from toolkit.kernels.prefill_attention import prefill_attention
from toolkit.kernels.prefill_attention import torch_form as blocks

H, G, D, PAGE = 6, 2, 8, 4
SETTINGS = list(itertools.product((None, 3, 7), (None, 2.0)))


class Case:
    """Sequences of some lengths, of whose tokens the last are queries."""

    def __init__(self, lengths, queries, dtype=torch.float32):
        torch.manual_seed(0)
        self.lengths, self.queries = lengths, queries
        self.k = [torch.randn(n, G, D).to(dtype) for n in lengths]
        self.v = [torch.randn(n, G, D).to(dtype) for n in lengths]
        self.q = torch.randn(sum(queries), H, D).to(dtype)
        self.starts = [0, *itertools.accumulate(queries)]
        needed = [-(-n // PAGE) for n in lengths]
        order = torch.randperm(sum(needed) + 3).tolist()
        spare = order[sum(needed) :]
        self.k_cache = torch.full((len(order), PAGE, G, D), torch.nan, dtype=dtype)
        self.v_cache = self.k_cache.clone()
        width, tables = max(needed), []
        for i, n in enumerate(needed):
            own = [order.pop(0) for _ in range(n)]
            slots = torch.tensor([own[t // PAGE] * PAGE + t % PAGE for t in range(lengths[i])])
            store(self.k_cache, slots, self.k[i])
            store(self.v_cache, slots, self.v[i])
            tables.append(own + [spare[0]] * (width - n))
        self.tables = torch.tensor(tables)

    def exact(self, scale, window, cap):
        outs, sums = [], []
        for i, n in enumerate(self.lengths):
            for row in range(self.queries[i]):
                place = n - self.queries[i] + row
                first = 0 if window is None else max(0, place - window + 1)
                out, lse = [], []
                for head in range(H):
                    k = self.k[i][first : place + 1, head // (H // G)].double()
                    v = self.v[i][first : place + 1, head // (H // G)].double()
                    s = k @ self.q[self.starts[i] + row, head].double() * scale
                    s = s if cap is None else cap * torch.tanh(s / cap)
                    out.append(torch.softmax(s, 0) @ v)
                    lse.append(torch.logsumexp(s, 0))
                outs.append(torch.stack(out))
                sums.append(torch.stack(lse))
        return torch.stack(outs), torch.stack(sums)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("window", "cap"), SETTINGS)
def test_prefill(impl, window, cap):
    case = Case([5, 17, 9, 1, 4], [5, 3, 9, 1, 1])
    got = prefill_attention(
        case.q,
        case.k_cache,
        case.v_cache,
        case.starts,
        case.lengths,
        case.tables,
        scale=0.3,
        window=window,
        soft_cap=cap,
        impl=impl,
    )
    out, lse = case.exact(0.3, window, cap)
    torch.testing.assert_close(got[0].double(), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].double(), lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("window", "cap"), SETTINGS)
def test_decode(impl, window, cap):
    case = Case([5, 17, 9, 1, 4], [1] * 5)
    got = decode_attention(
        case.q, case.k_cache, case.v_cache, case.lengths, case.tables, scale=0.3, window=window, soft_cap=cap, impl=impl
    )
    out, lse = case.exact(0.3, window, cap)
    torch.testing.assert_close(got[0].double(), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].double(), lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    case = Case([5, 17, 9], [5, 3, 9], dtype)
    arguments = (case.q, case.k_cache, case.v_cache, case.starts, case.lengths, case.tables)
    got = prefill_attention(*arguments, scale=0.3)[0]
    eager = prefill_attention(*arguments, scale=0.3, impl="reference")[0]
    check_stick(got.flatten(1), case.exact(0.3, None, None)[0].flatten(1), eager.flatten(1))
    single = Case([5, 17, 9], [1, 1, 1], dtype)
    arguments = (single.q, single.k_cache, single.v_cache, single.lengths, single.tables)
    got = decode_attention(*arguments, scale=0.3)[0]
    eager = decode_attention(*arguments, scale=0.3, impl="reference")[0]
    check_stick(got.flatten(1), single.exact(0.3, None, None)[0].flatten(1), eager.flatten(1))


def test_blocks_of_queries_do_not_matter(monkeypatch):
    case = Case([40, 23], [31, 23])
    arguments = (case.q, case.k_cache, case.v_cache, case.starts, case.lengths, case.tables)
    whole = prefill_attention(*arguments, scale=0.3, window=9)
    monkeypatch.setattr(blocks, "BLOCK", 5)
    parts = prefill_attention(*arguments, scale=0.3, window=9)
    torch.testing.assert_close(whole, parts)


def test_paging_helpers():
    cache = torch.arange(5 * 2 * 1 * 1.0).view(5, 2, 1, 1)
    table = torch.tensor([[3, 1], [0, 4]])
    assert gather(cache, table, 3).flatten().tolist() == [6, 7, 2, 0, 1, 8]
    assert gather(cache, table[0], 4).flatten().tolist() == [6, 7, 2, 3]
    assert visible(1, 3, 3, 2, torch.device("cpu")).tolist() == [[True, True, False], [False, True, True]]
