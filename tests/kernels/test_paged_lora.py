"""Grouped LoRA over pages: every row gets the change of its own adapters, from pages that are read once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.harness import (
    DEVICE,
    DOT_DTYPES,
    check_resources,
    compile_in_process,
    count_traffic,
    mutated,
)
from tests.oracles import check_stick
from toolkit.errors import UnsupportedError
from toolkit.kernels.grouped_lora import (
    PagedPairs,
    Pair,
    Routes,
    Segment,
    grouped_lora,
    paged_lora,
    paged_lora_backward,
    triton_form,
)
from toolkit.kernels.grouped_lora import triton as kernels
from toolkit.kernels.launch import GENERATIONS, compile_for, record

pytestmark = pytest.mark.usefixtures("nan_outputs")
K, WIDTHS, PAGE = 37, (53, 16, 19), 32
RANKS = [(1, 4, 0), (7, 7, 7), (16, 0, 3), (0, 0, 2), (33, 17, 1), (2, 2, 2)]
ROWS = [0, 0, 0, -1, 1, 2, 2, -1, 3, 4, 4, 5, 0, -1, 1]
"""Adapter of each row: several rows, one row, none; adapter 6 has no pair at all here."""


class Case:
    """Adapters in shuffled pages of a poisoned pool, and a batch."""

    def __init__(self, slots, dtype=torch.float32, weights=1.0, ranks=RANKS, dora=(), bias=(), k=K, widths=WIDTHS):
        torch.manual_seed(0)
        self.routes, self.k, self.widths = Routes.of(slots, weights), k, widths
        self.dtype, self.whole = dtype, dtype == torch.float32
        self.adapters = [[self.pair(i, r, n) for r, n in zip(rs, widths, strict=True)] for i, rs in enumerate(ranks)]
        for i in dora:
            self.adapters[i] = [
                p and Pair(p.a_rK, p.b_Nr, self.draw(len(p.b_Nr)) + 1, p.scale) for p in self.adapters[i]
            ]
        for i in bias:
            self.adapters[i] = [
                p and Pair(p.a_rK, p.b_Nr, p.gain_N, p.scale, self.draw(len(p.b_Nr))) for p in self.adapters[i]
            ]
        rows = len(self.routes.slots)
        self.x = self.draw(rows, k)
        self.weights = [self.draw(n, k) * (0.25 if self.whole else k**-0.5) for n in widths]
        self.biases = [None if i == 1 else self.draw(n) for i, n in enumerate(widths)]
        self.pairs = self.place()

    def draw(self, *sizes):
        drawn = torch.randint(-2, 3, sizes) if self.whole else torch.randn(*sizes)
        return drawn.to(DEVICE, self.dtype)

    def pair(self, index, rank, width):
        if not rank:
            return None
        return Pair(
            self.draw(rank, self.k), self.draw(width, rank), scale=2.0**-index if self.whole else 0.3 + index / 7
        )

    def place(self, page=PAGE):
        probe = PagedPairs(torch.empty(0, page, dtype=self.dtype, device=DEVICE), self.k, self.widths, 1)
        needed = [probe.pages_for(adapter) for adapter in self.adapters]
        order = torch.randperm(sum(needed) + 5).tolist()
        pool = torch.full((len(order), page), torch.nan, dtype=self.dtype, device=DEVICE)
        pairs = PagedPairs(pool, self.k, self.widths, len(self.adapters) + 1)
        for slot, (adapter, count) in enumerate(zip(self.adapters, needed, strict=True)):
            pairs.place(slot, adapter, [order.pop() for _ in range(count)])
        return pairs

    def base(self):
        return [torch.nn.functional.linear(self.x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]

    def run(self, impl="triton"):
        ys = self.base()
        paged_lora(ys, self.x, self.routes, self.pairs, self.biases, impl=impl)
        return ys

    def exact(self):
        """Every row on its own, from the factors as they were before they were placed, in float64."""
        ys = [y.double() for y in self.base()]
        for row, slot, weight in self.routes.present():
            adapter = self.adapters[slot] if slot < len(self.adapters) else [None] * len(ys)
            for y, pair, b in zip(ys, adapter, self.biases, strict=True):
                if pair is None:
                    continue
                change = pair.b_Nr.double() @ (pair.a_rK.double() @ self.x[row].double())
                change = change if pair.bias_N is None else change + pair.bias_N.double()
                if pair.gain_N is None:
                    y[row] += weight * pair.scale * change
                else:
                    b = 0 if b is None else b.double()
                    y[row] = pair.gain_N.double() * (y[row] - b + pair.scale * change) + b
        return ys

    def eager(self):
        """What torch makes of the factors a row at a time, without pages, whose faults must not widen the stick."""
        ys = self.base()
        named = [{str(i): a[n] for i, a in enumerate(self.adapters) if a[n]} for n in range(len(ys))]
        segments = [Segment(row, row + 1, str(slot), weight) for row, slot, weight in self.routes.present()]
        for y, pairs, bias in zip(ys, named, self.biases, strict=True):
            grouped_lora(y, self.x, segments, pairs, bias, impl="reference")
        return ys

    def check(self, got):
        """Compare with float64: numbers are whole in float32, so that nothing is rounded and all must be equal."""
        for y, exact, eager in zip(got, self.exact(), self.eager(), strict=True):
            if self.whole:
                assert torch.equal(y.double(), exact)
            else:
                check_stick(y, exact, eager)


COMPOSED = [[0, 1], [1, 0], [2, -1], [-1, -1], [1, 4], [4, 2], [0, 4], [5, -1], [3, 5], [1, 3], [6, 0]]
COMPOSED_WEIGHTS = np.random.default_rng(0).choice([-1, -0.5, 0.25, 0.75, 1], (len(COMPOSED), 2))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_one_adapter_per_row(impl, dtype):
    case = Case(ROWS, dtype)
    case.check(case.run(impl))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_weighted_compositions(impl, dtype):
    case = Case(COMPOSED, dtype, COMPOSED_WEIGHTS)
    case.check(case.run(impl))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_bfloat16_where_every_row_has_its_own_adapter(impl):
    case = Case([3, -1, 4, 0, 2, 5, 6, 1], torch.bfloat16)
    case.check(case.run(impl))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_dora_and_biases(impl, dtype):
    case = Case(ROWS, dtype, dora=(0, 2, 5), bias=(1, 2, 3, 4, 5))
    case.check(case.run(impl))


@pytest.mark.parametrize("slots", [ROWS, COMPOSED, [4] * 70 + [-1] + [2] * 35])
def test_rows_in_tiles_of_any_size(slots, monkeypatch):
    case = Case(slots, torch.float16)
    expected = case.run()
    case.check(expected)
    for generation in GENERATIONS:
        monkeypatch.setattr(triton_form, "generation_of", lambda _, own=generation: own)
        case.check(case.run())


@pytest.mark.parametrize("slots", [[], [-1], [[-1, -1]] * 3, [6, 6]])
def test_nothing_to_do(slots):
    case = Case(slots)
    with record() as launches:
        got = case.run()
    assert all(torch.equal(y, base) for y, base in zip(got, case.base(), strict=True))
    assert not launches


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_rows_and_linears_without_an_adapter_stay_bit_for_bit(impl):
    case = Case(ROWS)
    # A negative zero plus zero would be a positive one.
    case.x[[3, 7, 13]] = 0
    case.biases = [None] * 3
    before = [torch.where(y == 0, -0.0, y) for y in case.base()]
    ys = [y.clone() for y in before]
    paged_lora(ys, case.x, case.routes, case.pairs, impl=impl)
    for linear, (y, base) in enumerate(zip(ys, before, strict=True)):
        kept = [row for row, slot in enumerate(ROWS) if slot < 0 or not RANKS[slot][linear]]
        assert torch.equal(y[kept].view(torch.int32), base[kept].view(torch.int32))


@pytest.mark.parametrize("page", [16, 32, 64, 256])
def test_pages_of_any_size_hold_the_same(page):
    case = Case(ROWS, dora=(5,), bias=(1,))
    expected, case.pairs = case.run(), case.place(page)
    for y, other in zip(case.run(), expected, strict=True):
        torch.testing.assert_close(y, other)
    for slot, adapter in enumerate(case.adapters):
        for linear, pair in enumerate(adapter):
            read = case.pairs.pair(slot, linear)
            assert (read is None) == (pair is None)
            if pair is not None:
                a, b = case.pairs.elements(slot, linear)
                flat = case.pairs.pool.view(-1)
                assert torch.equal(read.a_rK, pair.a_rK)
                assert torch.equal(read.b_Nr, pair.b_Nr)
                assert torch.equal(flat[a], pair.a_rK)
                assert torch.equal(flat[b], pair.b_Nr)


def test_adapters_come_and_go():
    case = Case(ROWS)
    expected = case.run()
    pool, pairs = case.pairs.pool, case.pairs
    for round_ in range(6):
        slot = (2, 4)[round_ % 2]
        elements = [t.reshape(-1) for linear in range(3) for t in pairs.elements(slot, linear)]
        pages = (torch.cat(elements) // PAGE).unique().tolist()
        pairs.clear(slot)
        pool[pages] = torch.nan
        other = pairs.pages_for(case.adapters[slot])
        assert other == len(pages)
        pairs.place(slot, case.adapters[slot], pages[::-1])
        assert all(torch.equal(y, e) for y, e in zip(case.run(), expected, strict=True))


def test_rows_may_lie_anywhere():
    case = Case(ROWS, torch.float16)
    expected = case.run()
    wide = torch.full((len(ROWS), 3, 100), torch.nan, dtype=torch.float16, device=DEVICE)
    x, ys = wide[:, 0, 5 : 5 + K], [wide[:, 1, :53], wide[:, 1, 60:76], wide[:, 2, 1:20]]
    for view, value in zip([x, *ys], [case.x, *case.base()], strict=True):
        view.copy_(value)
    nans = wide.isnan().sum()
    paged_lora(ys, x, case.routes, case.pairs, case.biases, impl="triton")
    assert all(torch.equal(y, e) for y, e in zip(ys, expected, strict=True))
    assert wide.isnan().sum() == nans


def test_offsets_beyond_two_to_the_31():
    """Memory that is never touched costs nothing, so strides and pages lie far apart without being allocated."""
    case = Case([0, 1, 1, 4], torch.float16)
    expected = case.run()
    far = 2**31 + 48
    memory = torch.empty_strided((4 * far,), (1,), dtype=torch.float16, device=DEVICE)
    x, y = memory.as_strided((4, K), (far, 1)), memory.as_strided((4, 53), (far, 1), 100)
    x.copy_(case.x)
    ys = case.base()
    y.copy_(ys[0])
    paged_lora([y, *ys[1:]], x, case.routes, case.pairs, case.biases, impl="triton")
    assert torch.equal(y, expected[0])
    page = 1024
    pool = memory[: 4 * far // page * page].view(-1, page)
    pairs = PagedPairs(pool, K, WIDTHS, 7)
    pages = iter(range(len(pool) - 1, 0, -1))
    for slot in (0, 1, 4):
        pairs.place(slot, case.adapters[slot], [next(pages) for _ in range(pairs.pages_for(case.adapters[slot]))])
    assert int(pairs.offsets.max()) * 16 > 2**31
    case.pairs = pairs
    for y, other in zip(case.run(), expected, strict=True):
        torch.testing.assert_close(y, other)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_embedding(impl):
    case = Case(ROWS, torch.float16, widths=(53,), ranks=[r[:1] for r in RANKS])
    tokens = torch.randint(K, (len(ROWS),), device=DEVICE)
    case.biases = [None]
    ys = [torch.zeros_like(case.base()[0])]
    paged_lora(ys, tokens, case.routes, case.pairs, impl=impl)
    case.x = torch.nn.functional.one_hot(tokens, K).half()
    case.weights = [torch.zeros_like(case.weights[0])]
    case.check(ys)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DOT_DTYPES[1:])
@pytest.mark.parametrize("composed", [False, True])
def test_backward(impl, dtype, composed):
    case = Case(COMPOSED if composed else ROWS, dtype, COMPOSED_WEIGHTS if composed else 0.5)
    dys = [case.draw(len(case.x), n) for n in WIDTHS]
    got = paged_lora_backward(dys, case.x, case.routes, case.pairs, impl=impl)
    eager = paged_lora_backward(dys, case.x, case.routes, case.pairs, impl="reference")
    dx, grads = gradients(case, dys)
    check_stick(got[0], dx, eager[0])
    for where, exact in grads:
        # Gradients are float32, but what they are made of was rounded to the dtype of the factors, and a row of a
        # gradient is often one rounded number times a vector: the stick is the whole gradient.
        error, allowed = ((g.view(-1)[where].double() - exact).norm() for g in (got[1], eager[1]))
        assert error <= 2 * max(allowed, 0.5 * torch.finfo(dtype).eps * exact.norm())


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("composed", [False, True])
def test_backward_of_whole_numbers_is_exact(impl, composed):
    """Nothing is rounded, so every element of every gradient is known."""
    case = Case(COMPOSED if composed else ROWS, weights=0.5)
    dys = [case.draw(len(case.x), n) for n in WIDTHS]
    got = paged_lora_backward(dys, case.x, case.routes, case.pairs, impl=impl)
    dx, grads = gradients(case, dys)
    assert torch.equal(got[0].double(), dx)
    rest = got[1].view(-1).double()
    for where, exact in grads:
        assert torch.equal(rest[where], exact)
        rest[where] = 0
    assert not rest.any()


def gradients(case, dys):
    """The gradient of the input, and of every factor: its elements in the pool and their gradients, in float64."""
    x = case.x.double().requires_grad_()
    leaves, total = {}, 0
    for slot, adapter in enumerate(case.adapters):
        for linear, pair in enumerate(adapter):
            if pair is not None:
                leaves[slot, linear] = pair.a_rK.double().requires_grad_(), pair.b_Nr.double().requires_grad_()
    for row, slot, weight in case.routes.present():
        for linear, dy in enumerate(dys):
            if (slot, linear) in leaves:
                a, b = leaves[slot, linear]
                scale = weight * case.adapters[slot][linear].scale
                total = total + scale * (b @ (a @ x[row])) @ dy[row].double()
    total.backward()
    grads = []
    for (slot, linear), factors in leaves.items():
        grads += zip(case.pairs.elements(slot, linear), [f.grad for f in factors], strict=True)
    return x.grad, [(where, grad) for where, grad in grads if grad is not None]


def test_dora_cannot_be_weighted_or_combined():
    for slots, weights in (([0, 1], [1, 0.5]), ([[0, 1]], 1.0)):
        with pytest.raises(ValueError, match="DoRA"):
            Case(slots, weights=weights, dora=(1,)).run()


def test_what_does_not_fit_is_refused():
    case = Case(ROWS)
    ys = case.base()
    with pytest.raises(ValueError, match="expected"):
        paged_lora(ys[:2], case.x, case.routes, case.pairs)
    with pytest.raises(ValueError, match="different types"):
        paged_lora(ys, case.x.half(), case.routes, case.pairs)
    with pytest.raises(ValueError, match="next to each other"):
        paged_lora(ys, case.x.T.contiguous().T, case.routes, case.pairs)
    with pytest.raises(ValueError, match="twice"):
        Routes.of([[1, 1]])
    with pytest.raises(ValueError, match="takes"):
        case.pairs.place(6, case.adapters[0], [0])
    with pytest.raises(ValueError, match="factors of shapes"):
        case.pairs.place(6, [case.adapters[0][1]] * 3, [0])
    with pytest.raises(ValueError, match="power of two"):
        PagedPairs(torch.empty(3, 24), K, WIDTHS, 1)
    with pytest.raises(UnsupportedError, match="cannot compile"):
        with record() as launches:
            case.run()
        compile_for(90, launches[0])


@pytest.mark.parametrize(
    ("fault", "change"),
    {
        "scale off by 2%": lambda s: s.replace("y += scale * change", "y += 1.02 * scale * change").replace(
            "y + change\n", "y + 1.02 * change\n"
        ),
        "last columns dropped": lambda s: s.replace("n + ns < width", "n + ns < width - 1"),
        "a part of the features left out": lambda s: s.replace(
            "for part in range(parts)", "for part in range(1, parts)"
        ),
        "the pieces of a rank row mixed up": lambda s: s.replace("column // PAGE", "0"),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_planted_faults_are_caught(fault, change, monkeypatch):
    case = Case([0, 0, 1, 4, -1, 5], torch.float16)
    case.check(case.run())
    for name in ("_shrink_row", "_shrink_tile", "_expand_row", "_expand_tile"):
        monkeypatch.setattr(kernels, name, mutated(getattr(kernels, name), change))
    with pytest.raises(AssertionError):
        case.check(case.run())


def test_one_row_with_the_adapter_of_another_is_caught():
    case = Case(ROWS, torch.float16)
    got = case.run()
    for row, other in ((4, 2), (8, 9), (0, 4)):
        wrong = [ROWS[other] if i == row else slot for i, slot in enumerate(ROWS)]
        case.routes = Routes.of(wrong)
        with pytest.raises(AssertionError):
            case.check(got)


RANK16 = [(16,)] * 64
MIXED = [(rank,) for rank in (1, 8, 16, 64, 3, 40, 0, 5, 17)]


@pytest.mark.parametrize("ranks", [RANK16, MIXED], ids=["rank 16", "ranks 0 to 64"])
def test_decode_reads_every_factor_once_with_enough_programs(ranks):
    case = Case(range(len(ranks)), torch.float16, ranks=ranks, k=4096, widths=(4096,))
    case.pairs, case.biases = case.place(4096), [None]
    y = torch.zeros(len(ranks), 4096, dtype=torch.float16)
    with record() as launches, count_traffic(case.pairs.pool, case.x, y) as (pool, x, out):
        paged_lora([y], case.x, case.routes, case.pairs, impl="triton")
    ideal = 2 * 2 * 4096 * sum(rank for (rank,) in ranks)
    assert pool.loaded == pool.touched.sum() * 2 == ideal
    assert out.loaded == out.stored == y.nbytes - 2 * 4096 * ranks.count((0,))
    assert x.loaded <= 4 * case.x.nbytes
    assert [launched.name for launched in launches] == ["_shrink_row", "_expand_row"]
    if ranks is RANK16:
        assert min(np.prod(launched.grid) for launched in launches) >= 2 * GENERATIONS[90].multiprocessors


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_ranks_reads_a_tenth_more_than_the_factors_at_most(seed):
    """Some adapters have one row, some up to a whole tile, and ranks are anything."""
    rng = np.random.default_rng(seed)
    ranks = [(int(rank),) for rank in rng.integers(1, 65, 6)]
    slots = [slot for slot in range(6) for _ in range(rng.choice([1, 1, 2, 5, 16]))]
    case = Case(rng.permutation([*slots, -1, -1]), torch.float16, ranks=ranks, k=768, widths=(512,))
    case.pairs, case.biases = case.place(1024), [None]
    (y,) = case.base()
    with count_traffic(case.pairs.pool, y) as (pool, out):
        paged_lora([y], case.x, case.routes, case.pairs, impl="triton")
    ideal = 2 * (768 + 512) * sum(rank for (rank,) in ranks)
    assert pool.touched.sum() * 2 == ideal
    assert pool.loaded <= 1.1 * ideal
    assert out.loaded == out.stored == 2 * 512 * len(slots)


def test_every_output_belongs_to_one_program_and_few_rows_share_factors():
    slots = [[row % 8, 8 + row % 5] if row % 3 else [row % 8, -1] for row in range(48)]
    case = Case(slots, torch.float16, ranks=[(1 + 5 * i % 37,) for i in range(13)], k=512, widths=(256,))
    case.pairs, case.biases = case.place(512), [None]
    (y,) = case.base()
    with count_traffic(case.pairs.pool, y) as (pool, out):
        paged_lora([y], case.x, case.routes, case.pairs, impl="triton")
    # The interpreter runs one program after another, so only this tells that none overwrites what another adds.
    assert out.stored == out.loaded == y.nbytes
    ideal = 2 * (512 + 256) * case.pairs.ranks.sum()
    assert pool.touched.sum() * 2 == ideal
    # Rows with one adapter and rows with several are different tiles, and B is read by both.
    assert pool.loaded <= 2 * ideal


CASES = ["decode", "decode_float32", "prefill", "prefill_float32", "backward", "embedding"]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles(generation):
    found = compile_in_process(["decode", "prefill", "backward", "embedding"], generation)
    check_resources(found, GENERATIONS[generation].shared_memory)
    assert {kernel["kernel"] for kernel in found} == set(triton_form.TABLE.kernels(generation))
    # Single columns of an embedding, and one output of a bias per thread, are narrow by nature.
    assert {k["kernel"] for k in found if k["narrow"] and not k["constants"].get("EXTRAS")} == {"_shrink_token"}


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_whole_table_compiles(generation):
    found = compile_in_process(CASES, generation, whole_table=True)
    check_resources(found, GENERATIONS[generation].shared_memory)
