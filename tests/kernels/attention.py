"""What the tests of attention share: sequences in shuffled, poisoned pages, and attention by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from tests.kernels.harness import DEVICE
from tests.oracles import check_stick
from toolkit.kernels.paging import store


class Case:
    """Sequences of some lengths, with some numbers of queries each, which are the last of their tokens."""

    def __init__(self, lengths, queries=None, dtype=torch.float32, *, heads=(6, 2), size=24, page=4, seed=0):
        torch.manual_seed(seed)
        self.h, self.g = heads
        self.lengths, self.queries = list(lengths), list(queries or [1] * len(lengths))
        self.k = [torch.randn(n, self.g, size).to(DEVICE, dtype) for n in lengths]
        self.v = [torch.randn(n, self.g, size).to(DEVICE, dtype) for n in lengths]
        self.q = torch.randn(sum(self.queries), self.h, size).to(DEVICE, dtype)
        self.starts = [0, *itertools.accumulate(self.queries)]
        self.place(page)

    def place(self, page: int, common: Sequence[int] = (), tokens: int = 0, *, shuffled: bool = True) -> None:
        """Put keys and values into pages; sequences in `common` share their first tokens, whole pages."""
        needed = [-(-n // page) for n in self.lengths]
        order = torch.randperm(sum(needed) + 3).tolist() if shuffled else list(reversed(range(sum(needed) + 3)))
        self.k_cache = torch.full(
            (len(order), page, *self.k[0].shape[1:]), torch.nan, dtype=self.q.dtype, device=DEVICE
        )
        self.v_cache, spare = self.k_cache.clone(), order.pop()
        tables: list[list[int]] = []
        for i, n in enumerate(needed):
            shared = tables[common[0]][: tokens // page] if i in common[1:] else []
            own = shared + [order.pop() for _ in range(n - len(shared))]
            if shared:
                self.k[i][:tokens], self.v[i][:tokens] = self.k[common[0]][:tokens], self.v[common[0]][:tokens]
            places = [own[t // page] * page + t % page for t in range(self.lengths[i])]
            slots = torch.tensor(places, dtype=torch.int64, device=DEVICE)
            store(self.k_cache, slots, self.k[i])
            store(self.v_cache, slots, self.v[i])
            tables.append(own + [spare] * (max(needed) - n))
        self.tables = torch.tensor(tables, device=DEVICE)

    @property
    def positions(self) -> list[int]:
        return [n - q for n, q in zip(self.lengths, self.queries, strict=True)]

    def exact(self, scale, window=None, soft_cap=None, num_global=0, sinks_H=None, positions=None):
        """One softmax per query and head over the keys it sees, in float64."""
        outs, sums = torch.zeros(self.q.shape, dtype=torch.float64), torch.zeros(self.q.shape[:2], dtype=torch.float64)
        for i, position in enumerate(positions or self.positions):
            k, v = self.k[i].double().cpu(), self.v[i].double().cpu()
            for row in range(self.queries[i]):
                at = position + row
                near = [t <= at and (window is None or t > at - window or t < num_global) for t in range(len(k))]
                for head in range(self.h):
                    own, q = head // (self.h // self.g), self.q[self.starts[i] + row, head].double().cpu()
                    scores = k[near][:, own] @ q * scale
                    scores = scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)
                    values = v[near][:, own]
                    if sinks_H is not None:
                        scores = torch.cat([scores, sinks_H[head : head + 1].double().cpu()])
                        values = torch.cat([values, torch.zeros(1, values.shape[1], dtype=torch.float64)])
                    sums[self.starts[i] + row, head] = torch.logsumexp(scores, 0)
                    if len(scores):
                        outs[self.starts[i] + row, head] = torch.softmax(scores, 0) @ values
        return outs, sums


def check(got, exact, eager) -> None:
    """Judge outputs per row and per column, and sums of exponentials by their own size.

    In float16 by the stick; in float32, where eager torch is off by a few roundings of a short sum and so says little,
    within 5e-6 of the norm of a row or a column, or of the mean norm where that is larger.
    """
    if got[0].dtype == torch.float32:
        assert_near(got[0].cpu().flatten(1), exact[0].flatten(1), 5e-6)
    else:
        check_stick(got[0].cpu().flatten(1), exact[0].flatten(1), eager[0].cpu().flatten(1))
    torch.testing.assert_close(got[1].double().cpu(), exact[1], rtol=1e-5, atol=1e-5 if got[0].itemsize > 2 else 4e-4)


def assert_near(got: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    """Check every row and column within a bound of its norm, or of the mean norm where that is larger."""
    got, exact = (t.detach().double().reshape(-1, t.shape[-1]) for t in (got, exact))
    for dim in (0, 1):
        size = exact.norm(dim=dim)
        error, limit = (got - exact).norm(dim=dim), bound * size.clamp_min(size.mean())
        assert (error <= limit).all(), f"{('column', 'row')[dim]} {int((error - limit).argmax())} is off"
