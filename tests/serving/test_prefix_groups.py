"""Prompts that begin alike come together, and what is shared is computed once even where little can be kept."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.serving.traffic import Device, request, run_step
from toolkit.serving.pages import PagePool
from toolkit.serving.prefix import PrefixCache
from toolkit.serving.prefix_groups import batch_order, shared
from toolkit.serving.scheduler import Scheduler

pytestmark = pytest.mark.system("batchllm")


def run(prompts: list[list[int]], order: list[int], pages: int, running: int) -> tuple[int, int]:
    """Return the tokens of prompts that are computed, and the most pages that were in use."""
    pool = PagePool(pages, 1)
    device = Device(pool)
    scheduler = Scheduler(pool, 64, running, prefixes=PrefixCache(pool))
    for i in order:
        scheduler.add(request(str(i), prompts[i], 1))
    computed = peak = 0
    while scheduler.has_work:
        computed += sum(run_step(scheduler, device).values())
        peak = max(peak, pages - pool.num_free + pool.num_idle)
    assert pool.num_free == pages
    return computed, peak


def walks(prompts: list[list[int]], order: list[int]) -> int:
    """Tokens that are read if only what the prompt before has in common is kept."""
    read = len(prompts[order[0]])
    return read + sum(len(prompts[b]) - shared(prompts[a], prompts[b]) for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("seed", range(12))
def test_no_order_shares_more(seed):
    """Of all orders of a few prompts, none reads less; the fewest are the nodes of the trie."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 5))] for _ in range(6)]
    order = batch_order(prompts, [1] * 6, [""] * 6, 1)
    assert sorted(order) == list(range(6))
    nodes = len({tuple(p[: i + 1]) for p in prompts for i in range(len(p))})
    assert walks(prompts, order) == min(walks(prompts, list(o)) for o in itertools.permutations(range(6))) == nodes


@pytest.mark.parametrize("seed", range(4))
def test_a_small_pool_computes_less_in_this_order_than_first_come_first_served(seed):
    rng = random.Random(seed)
    openings = [[10 * g + i for i in range(12)] for g in range(5)]
    prompts = [openings[i % 5] + [100 + rng.randrange(50)] for i in range(40)]
    order = batch_order(prompts, [1] * 40, [""] * 40, 1)
    grouped, peak = run(prompts, order, 30, 2)
    plain, plain_peak = run(prompts, list(range(40)), 30, 2)
    nodes = 5 * 12 + 40
    assert grouped == nodes
    assert plain > 2 * nodes, "five openings do not fit into the pool at once"
    assert peak <= plain_peak


def test_what_generates_most_for_what_it_reads_comes_first():
    prompts = [[1, 2, 3, 4], [9] * 8, [1, 2, 3, 5], [7, 7]]
    assert batch_order(prompts, [2, 80, 2, 2], [""] * 4, 2) == [1, 3, 0, 2]
    assert batch_order(prompts, [2, 2, 90, 2], ["", "", "a", ""], 2) == [2, 3, 0, 1]


def test_two_adapters_are_two_groups():
    prompts = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert batch_order(prompts, [1] * 4, ["a", "b", "a", "b"], 2) == [0, 2, 1, 3]
