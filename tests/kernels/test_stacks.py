"""Stacked copies are what the pages hold, whichever adapters come and go between batches."""

from __future__ import annotations

import random

import pytest
import torch

from toolkit.kernels.grouped_lora import PagedPairs, Pair, Routes, paged_lora
from toolkit.kernels.grouped_lora.routes import MOST_ROWS
from toolkit.kernels.grouped_lora.stacks import FEWEST

K, WIDTHS, RANKS = 24, (16, 40), [(3, 3), (2, 5), (4, 0)]


def random_pairs(ranks: tuple[int, ...], generator: torch.Generator) -> list[Pair | None]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        Pair(normal(r, K), normal(width, r), scale=0.5 + r) if r else None
        for r, width in zip(ranks, WIDTHS, strict=True)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_stacks_follow_adapters_that_come_and_go(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pairs = PagedPairs(torch.zeros(400, 64, dtype=torch.float64), K, WIDTHS, 12)
    free, taken = list(range(400)), {}
    for _ in range(40):
        slot = rng.randrange(12)
        if slot in taken:
            pairs.clear(slot)
            free += taken.pop(slot)
        if rng.random() < 0.9:
            factors = random_pairs(rng.choice(RANKS), generator)
            count = pairs.pages_for(factors)
            taken[slot], free = free[:count], free[count:]
            pairs.place(slot, factors, taken[slot])
        # Some of these slots are empty: their adapter leaves the linears alone.
        rows = [[rng.randrange(-1, 12), -1] for _ in range(rng.choice([1, 9, 30]))]
        rows += [[rng.choice([*taken, -1]), -1]] * rng.choice([0, MOST_ROWS + 3])
        for row in rows:
            row[1] = rng.choice([other for other in [-1, *taken] if other != row[0] or other < 0])
        weights = torch.randn(len(rows), 2, generator=generator).numpy()
        routes, x = Routes.of(rows, weights), torch.randn(len(rows), K, generator=generator, dtype=torch.float64)
        before = [torch.randn(len(rows), width, generator=generator, dtype=torch.float64) for width in WIDTHS]
        got, expected = [y.clone() for y in before], [y.clone() for y in before]
        paged_lora(got, x, routes, pairs, impl="torch")
        paged_lora(expected, x, routes, pairs, impl="reference")
        for one, other, y in zip(got, expected, before, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
            untouched = [i for i, row in enumerate(rows) if not set(row) & set(taken)]
            assert torch.equal(one[untouched], y[untouched])
    assert any(stack.slots for stack in pairs.stacks._stacks.values()), "nothing was stacked"


@pytest.mark.parametrize(
    ("counts", "weighted", "is_stacked"),
    [
        ([13, 13, 13, 13], False, True),  # the rows as they are
        ([13, 13, 13, 13], True, True),
        ([11, 13, 12, 13], True, True),  # the shorter ones are filled up
        ([1, 40, 1, 1], True, False),  # the few rows alone
        ([10, 40, 11, 90], True, False),
    ],
)
def test_adapters_with_about_equally_many_rows_share_a_product(counts, weighted, is_stacked):
    generator = torch.Generator().manual_seed(1)
    pairs = PagedPairs(torch.zeros(100, 64, dtype=torch.float64), K, WIDTHS, len(counts))
    for slot in range(len(counts)):
        factors = random_pairs((2, 5), generator)
        pairs.place(slot, factors, list(range(20 * slot, 20 * slot + pairs.pages_for(factors))))
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
    weights = torch.randn(len(slots), generator=generator).numpy() if weighted else 1.0
    routes, x = Routes.of(slots, weights), torch.randn(len(slots), K, generator=generator, dtype=torch.float64)
    ys = [torch.randn(len(slots), width, generator=generator, dtype=torch.float64) for width in WIDTHS]
    expected = [y.clone() for y in ys]
    paged_lora(ys, x, routes, pairs, impl="torch")
    paged_lora(expected, x, routes, pairs, impl="reference")
    for one, other in zip(ys, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    stacked = {slot for stack in pairs.stacks._stacks.values() for slot in stack.slots}
    few = {slot for slot, count in enumerate(counts) if count <= MOST_ROWS}
    assert stacked == (set(range(len(counts))) if is_stacked else few if len(few) >= FEWEST else set())


@pytest.mark.parametrize("pages", [[3, 4, 5, 6], [3, 5, 4, 6], [6, 5, 4, 3]], ids=str)
def test_pages_in_any_order_hold_what_was_placed(pages):
    """Rows that fill their pages are copied at once only where the pages follow each other."""
    generator = torch.Generator().manual_seed(2)
    pairs = PagedPairs(torch.full((8, 64), torch.nan), 32, (32,), 1)
    placed = Pair(torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator))
    assert pairs.pages_for([placed]) == len(pages)
    pairs.place(0, [placed], pages)
    read = pairs.read(0, 0)
    assert read is not None
    assert torch.equal(read.a_rK, placed.a_rK)
    assert torch.equal(read.b_Nr, placed.b_Nr)


def test_an_adapter_that_is_placed_anew_in_the_same_slot_is_copied_anew():
    generator = torch.Generator().manual_seed(0)
    pairs = PagedPairs(torch.zeros(100, 64, dtype=torch.float64), K, WIDTHS, 3)
    routes, x = Routes.of([0, 1, 2]), torch.randn(3, K, generator=generator, dtype=torch.float64)
    for at in range(2):
        for slot in range(3):
            if at:
                pairs.clear(slot)
            factors = random_pairs((3, 3), generator)
            count = pairs.pages_for(factors)
            pairs.place(slot, factors, list(range(20 * slot, 20 * slot + count)))
        ys = [torch.zeros(3, width, dtype=torch.float64) for width in WIDTHS]
        expected = [y.clone() for y in ys]
        paged_lora(ys, x, routes, pairs, impl="torch")
        paged_lora(expected, x, routes, pairs, impl="reference")
        for one, other in zip(ys, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
